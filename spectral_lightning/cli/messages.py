"""Sentences for the parser's errors, which by themselves list every type that did not fit."""

import inspect
import pydoc
import re
from collections.abc import Callable, Iterable

from spectral_lightning.cli.suggest import did_you_mean

_BOILERPLATE = re.compile(
    r"^\s*(- )?(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class"
    r" 'NoneType'>|Not a valid subclass of|Subclass types expect|- a (class|dict)).*$",
    re.MULTILINE,
)


def sentence(message: str, options: Iterable[str], class_names: Callable[[str], list[str]]) -> str:
    """Say in one sentence what the parser did not accept, with the nearest known name.

    Args:
        message: The parser's own message, of several lines.
        options: The option strings that exist, such as ``--trainer.max_steps``.
        class_names: Gives the classes that the dotted key of an option accepts.

    Returns:
        One line; for a message of an unknown form, that message without its boilerplate.
    """
    explain = (_unknown_option(message, options), _unknown_init_arg(message))
    found = next(filter(None, explain), None) or _unknown_class(message, class_names)
    found = found or _missing(message) or _wrong_type(message)
    rest = re.sub(r'Parser key "([^"]+)":', r"`\1`:", _BOILERPLATE.sub("", message))
    return found or " ".join(rest.split())


def _keys(message: str) -> str:
    """The dotted key that the parser's nested error reports lead to."""
    return ".".join(re.findall(r'Parser key "([^"]+)"', message))


def _unknown_option(message: str, options: Iterable[str]) -> str | None:
    if match := re.search(r"unrecognized arguments: ([^\s=]+)", message):
        name = match.group(1)
        if not name.startswith("-"):
            return f"Unexpected argument `{name}`."
        return f"Unknown option `{name}`{did_you_mean(name, options)}"
    if match := re.search(r"does not accept option '([^']+)'", message):
        keys = (option.lstrip("-") for option in options)
        return f"Unknown key `{match.group(1)}`{did_you_mean(match.group(1), keys)}"
    return None


def _unknown_init_arg(message: str) -> str | None:
    match = re.search(r"Option '([^']+)' is not accepted", message)
    if match is None:
        return None
    name = match.group(1).split(".")[0]
    # The owner is named before the option, or after it on the same line for a callable's class.
    before = re.findall(r"given class_path '([^']+)'", message[: match.start()])
    after = re.match(r"[^\n]*?class_path='([^']+)'", message[match.end() :])
    if after is None and not before:
        return f"Unknown key `{name}`."
    owner = after.group(1) if after else before[-1]
    known = _init_args(owner)
    if owner == "lightning.Callback":  # where a key beside class_path ends up
        known = ["class_path", "init_args"]
    suggestion = did_you_mean(name, known)
    if suggestion == "." and known:
        suggestion = f"; it has {', '.join(f'`{key}`' for key in known)}."
    return f"`{owner.rsplit('.', 1)[-1]}` has no option `{name}`{suggestion}"


def _init_args(class_path: str) -> list[str]:
    """Names of the constructor's parameters, those of the base classes included."""
    owner = pydoc.locate(class_path)
    functions = [owner]
    if inspect.isclass(owner):
        functions = [vars(cls).get("__init__") for cls in owner.__mro__]
    names = [
        name
        for function in functions
        if inspect.isfunction(function)
        for name in inspect.signature(function).parameters
    ]
    return [name for name in dict.fromkeys(names) if name not in ("self", "args", "kwargs")]


def _unknown_class(message: str, class_names: Callable[[str], list[str]]) -> str | None:
    patterns = (
        r"Expected a path but (\S+) either not accessible",
        r"Expected a dot import path string: (\S+)",
        r"Problem with given class_path '([^']+)':\s+(?:No module|module|Unable|cannot)",
    )
    match = next(filter(None, (re.search(pattern, message) for pattern in patterns)), None)
    if match is None:
        return None
    given, key = match.group(1), _keys(message)
    if "/" in given or given.endswith((".yaml", ".yml", ".json")):
        return f"`{key}` names the file {given}, which does not exist."
    known = class_names(key)
    suggestion = did_you_mean(given.rsplit(".", 1)[-1], known)
    return f"`{key}` names the class {given}, which is not known{suggestion}"


def _missing(message: str) -> str | None:
    match = re.search(r"the following arguments are required: (.+)", message)
    if match is None:
        return None
    owners = re.findall(r"given class_path '([^']+)'", message[: match.start()])
    names = ", ".join(f"`{name.strip()}`" for name in match.group(1).split(","))
    if owners:
        return f"`{owners[-1].rsplit('.', 1)[-1]}` needs {names}, which was not given."
    return f"{names.replace('fit.', '--')} must be given, or a `--config` file that holds it."


def _wrong_type(message: str) -> str | None:
    match = re.search(r"Expected an? (.+?)\. Got value: ([^\n]*)", message)
    if match is None:
        return None
    expected = re.sub(r"<class '([^']+)'>", r"\1", match.group(1))
    return f"`{_keys(message[: match.start()])}` must be of type {expected}, got {match.group(2)}."

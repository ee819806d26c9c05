"""A tiny text as a file of tokens, and all ids of its parts."""

RHYME = "the cat saw the dog and the dog saw <unk> cats\n" * 8 + "the owl saw a cat\n" * 2
WORDS = RHYME.split()  # 98 of them, the last 10 with three words of their own


def ids(data, split):
    """All ids of one part."""
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    shard = loader.dataset.shard
    return shard.read(0, len(shard)).tolist()

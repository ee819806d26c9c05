import pytest
import torch

from spectral_lightning.callbacks import SpectralCallback, SpectralMonitor
from spectral_lightning.testing.tasks import TinyTask


class Reader(SpectralCallback):
    """Keep what was read, by step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found = {}

    def on_readings(self, trainer, pl_module, step):
        self.found[step] = {name: self.spectra[name] for name in self.names}


@pytest.mark.parametrize("name", ["every_n_steps", "spectrum_every_n_steps"])
def test_intervals_below_one_are_refused_at_construction(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be >= 1, got 0\."):
        SpectralCallback(**{name: 0})


def test_there_are_no_readings_before_a_fit():
    callback = SpectralCallback()
    with pytest.raises(RuntimeError, match="`SpectralCallback` must be used in a Trainer that has"):
        _ = callback.spectra
    assert callback.names == ()


def test_a_split_that_does_not_fit_is_refused_before_training(fit):
    with pytest.raises(ValueError, match="`splits` must give positive row counts that sum to"):
        fit(SpectralCallback(splits={"net.2": {"q": 20, "k": 19}}))


def test_parts_of_a_fused_projection_are_layers(fit):
    callback = Reader("net.2", splits={"net.2": {"q": 10, "kv": 30}})
    fit(callback)
    assert [(name, r.shape) for name, r in callback.found[0].items()] == [
        ("net.2.q", (10, 40)),
        ("net.2.kv", (30, 40)),
    ]


def test_several_globs_select_their_union_in_the_order_of_the_model(fit):
    callback = Reader(["net.7", "net.[02]"])
    fit(callback)
    assert callback.names == ("net.0", "net.2", "net.7")


def test_spectra_off_the_beat_of_the_norms_are_acted_on(fit):
    callback = Reader(every_n_steps=2, spectrum_every_n_steps=3)
    fit(callback, max_steps=7)
    assert list(callback.found) == [0, 2, 3, 4, 6]
    assert all(r.step == r.spectrum_step == 3 for r in callback.found[3].values())


def test_readings_of_the_last_step_reach_the_cache_but_are_not_acted_on(fit):
    callback = Reader(every_n_steps=3)
    fit(callback)
    assert list(callback.found) == [0, 3]
    assert {r.step for r in callback.spectra.values()} == {6}


def test_skipped_weights_are_named_with_the_reason(fit, caplog, make_embedding_task):
    fit(SpectralCallback(), task=make_embedding_task())
    expected = "SpectralCallback: net.embed is not measured, since it is an embedding table"
    assert [expected in message for message in caplog.messages].count(True) == 1


def test_a_reader_beside_a_monitor_adds_no_decomposition(fit):
    alone, monitor, reader = SpectralMonitor(), SpectralMonitor(), Reader(every_n_steps=2)
    fit(alone)
    fit(monitor, reader)
    assert reader.spectra is monitor.spectra
    assert monitor.spectra.num_decompositions == alone.spectra.num_decompositions


def test_a_layer_written_to_is_measured_again_within_the_step(fit):
    """The way of an actuator: write, forget, and the readings follow."""

    class Halve(Reader):
        def on_readings(self, trainer, pl_module, step):
            super().on_readings(trainer, pl_module, step)
            if step == 2:
                pl_module.net[2].weight.data.mul_(0.5)
                self.spectra.forget("net.2")
                assert self.spectra.measure(trainer.global_step) == ["net.2"]

    callback = Halve()
    fit(callback)
    # Step 3 was measured twice: its first reading, of the old weight, is not delivered.
    ratio = callback.found[3]["net.2"].spectral_norm / callback.found[2]["net.2"].spectral_norm
    assert ratio == pytest.approx(0.5, abs=0.05)


def test_accumulation_over_the_end_of_an_epoch_reads_each_step_once(fit):
    callback = Reader()
    fit(callback, accumulate_grad_batches=4, max_epochs=2, max_steps=-1)  # windows of 4 and 2
    assert list(callback.found) == [0, 1, 2, 3]


def test_no_interval_is_missed_where_a_batch_takes_several_optimizer_steps(fit):
    class TwoOptimizers(TinyTask):
        automatic_optimization = False

        def configure_optimizers(self):
            parts = (self.net[0], self.net[2])
            return [torch.optim.SGD(part.parameters(), lr=1e-2) for part in parts]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                loss = super().training_step(batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    callback = Reader(every_n_steps=3, spectrum_every_n_steps=7)
    fit(callback, task=TwoOptimizers(), max_steps=20)  # steps 2, 4, 6, ...
    assert list(callback.found) == [0, 4, 6, 8, 10, 12, 14, 16, 18]
    spectra = {r.spectrum_step for found in callback.found.values() for r in found.values()}
    assert spectra == {0, 8, 14}


def test_a_callback_added_to_a_resumed_run_begins_with_the_weights_it_finds(
    fit, make_trainer, tmp_path
):
    trainer = make_trainer(max_steps=5)
    trainer.fit(TinyTask())
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    callback = Reader(every_n_steps=10)
    fit(callback, ckpt_path=tmp_path / "five.ckpt", max_steps=12)
    assert list(callback.found) == [5, 10]

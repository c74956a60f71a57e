"""Somebody fine-tunes a Hugging Face model with a module of their own, adds three callbacks, and gets the dashboard."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from helpers import make_trainer
from hf_models import save_bert
from lit_callbacks import AttentionEntropyMonitor, Dashboard, GradientNormLogger, LossSpikeRecovery
from wandb_file import WandbFile

OF_ALL_GRADIENTS = [f"grad_norm/{n}" for n in ("total", "clipped", "rms", "nonfinite", "vanishing", "exploding")]
SECRETS = {"WANDB_API_KEY": "0123456789" * 4, "HF_TOKEN": "hf_swordfish_swordfish"}


class FineTuning(LightningModule):
    """What a tutorial has."""

    def __init__(self, path, lr=1e-3):
        super().__init__()
        import transformers

        self.save_hyperparameters()
        self.model = transformers.AutoModelForMaskedLM.from_pretrained(path).train()

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch["ids"], labels=batch["ids"]).loss * batch["factor"].mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.model(input_ids=batch["ids"], labels=batch["ids"]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def batches(bad=()):
    ids = torch.randint(5, 50, (64, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"ids": row, "factor": torch.tensor(float("nan") if i in bad else 1.0)} for i, row in enumerate(ids)]
    return DataLoader(rows, batch_size=4)


@pytest.fixture(scope="module")
def wandb_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DATA_DIR": str(folder / "data"), **SECRETS}
        for name, value in settings.items():
            patch.setenv(name, value)
        torch.manual_seed(0)
        logger = WandbLogger(project="mine", save_dir=folder, offline=True)
        callbacks = [
            AttentionEntropyMonitor(every_n_steps=2),
            GradientNormLogger(every_n_steps=2),
            LossSpikeRecovery(),
            Dashboard(every_n_steps=8, checkpoints=True),
        ]
        saves = [ModelCheckpoint(folder / "best", monitor="val/loss"), ModelCheckpoint(folder / "last")]
        trainer = make_trainer(
            max_epochs=2,
            logger=logger,
            callbacks=[*callbacks, *saves],
            enable_checkpointing=True,
            default_root_dir=folder,
        )
        trainer.fit(FineTuning(save_bert(folder / "bert")), batches(bad=[22]), batches())
        logger.experiment.finish()
        return WandbFile(folder)


def test_metrics_are_in_sections_over_the_optimizer_steps(wandb_file):
    sections = {key.partition("/")[0] for key in wandb_file.keys}
    assert sections == {
        "train", "val", "attention_entropy", "attention_entropy_p5", "attention_collapsed", "attention_logit_max",
        "attention_first", "grad_norm", "loss_spike", "heat_maps", "events", "trainer", "epoch",
    }  # fmt: skip
    assert all("trainer/global_step" in row for row in wandb_file.rows)
    assert wandb_file.metrics["*"].step_metric == "trainer/global_step"
    assert all(
        metric.step_metric == "trainer/global_step" for key, metric in wandb_file.metrics.items() if "loss" in key
    )


def test_what_is_of_a_layer_is_in_the_run_and_no_chart_is_made_of_it(wandb_file):
    hidden = {key for key, metric in wandb_file.metrics.items() if metric.options.hidden}
    assert hidden == {
        key
        for key in wandb_file.keys
        if key.startswith(("grad_norm/", "attention_")) and key not in ("attention_entropy/min", *OF_ALL_GRADIENTS)
    }
    kinds = ("attention_in", "attention_out", "feed_forward_in", "feed_forward_out", "norm", "embedding", "head")
    assert hidden >= {"grad_norm/layer_0", "grad_norm/layer_1", *(f"grad_norm/{kind}" for kind in kinds)}
    assert len(hidden) == 5 * 2 + 10, "five keys of two layers' attention, and the groups of the gradient"
    for key in hidden:
        definition = wandb_file.metrics[key]
        assert (definition.step_metric, definition.options.step_sync) == ("trainer/global_step", True)
        rows = [row for row in wandb_file.rows if key in row]
        assert [row["trainer/global_step"] for row in rows] == list(range(0, 32, 2))
        assert wandb_file.summary[key] == rows[-1][key], "the summary is the last value, as of any other key"


def test_no_key_comes_twice_for_a_step(wandb_file):
    assert len(wandb_file.rows) > 20
    assert wandb_file.twice() == set()


def test_summaries_are_the_best_and_the_verdict(wandb_file):
    losses = [row["val/loss"] for row in wandb_file.rows if "val/loss" in row]
    assert len(losses) == 2
    assert wandb_file.summary["val/loss"] == {"min": min(losses)}
    assert wandb_file.summary["loss_spike/skipped_steps"] == {"max": 2}, "the bad sample comes in each epoch"
    assert wandb_file.summary["health/verdict"] == "recovered"
    assert wandb_file.summary["health/first_warning_step"] == 5
    assert wandb_file.summary["health/culprit"] == "", "of a loss that is not finite no layer is to blame"
    assert (wandb_file.summary["health/rollbacks"], wandb_file.summary["health/steps_lost"]) == (0, 0)


def test_pictures_and_tables_have_their_step(wandb_file):
    steps = [row["trainer/global_step"] for row in wandb_file.rows if "heat_maps/attention_entropy" in row]
    assert steps[-1] == 31
    assert steps[0] == 7
    tables = [row["trainer/global_step"] for row in wandb_file.rows if "events/table" in row]
    assert tables == [7, 23]
    assert len(list(wandb_file.path.parent.glob("files/media/images/heat_maps/attention*.png"))) == len(steps)
    written = wandb_file.path.parent.glob("files/media/table/events/*.json")
    assert sorted(path.read_text().count('"skip"') for path in written) == [1, 2]


def test_alerts_tags_and_configuration(wandb_file):
    assert [title for title, _ in wandb_file.alerts] == ["Loss spike: steps are skipped"]
    assert "step 5: not finite" in wandb_file.alerts[0][1]
    assert wandb_file.tags == ["single_device", "32-true"]
    assert wandb_file.config["lr"] == 1e-3


def test_checkpoints_are_kept_on_request(wandb_file):
    kept = [artifact for artifact in wandb_file.artifacts if artifact.type == "model"]
    assert [set(artifact.aliases) - {"latest"} for artifact in kept] == [{"best"}, {"last"}]
    assert {artifact.name[: len("checkpoint-")] for artifact in kept} == {"checkpoint-"}
    assert all(artifact.manifest.contents[0].size > 1000 for artifact in kept)


def test_nothing_secret_is_in_it(wandb_file):
    files = [path for path in wandb_file.path.parent.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        for name, value in SECRETS.items():
            assert value.encode() not in path.read_bytes(), f"{name} is in {path}"

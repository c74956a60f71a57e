"""What every callback of the package promises."""

import ast
import inspect
import pickle
import re
import sys
import typing
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from torch.utils._pytree import tree_map_only

import lit_callbacks
from helpers import MemoryLogger, OldTinyLM, TinyLM, assert_identical, loader, snapshot
from lit_callbacks._observer import Observer
from lit_callbacks.rules import SixSigma, SpikeRule

pytestmark = pytest.mark.filterwarnings("ignore:step .* the gradient is not finite")

PACKAGE = Path(lit_callbacks.__file__).parent
PUBLIC = [getattr(lit_callbacks, name) for name in lit_callbacks.__all__]
CALLBACKS = [thing for thing in PUBLIC if inspect.isclass(thing) and issubclass(thing, Callback)]
OBSERVERS = [cls for cls in CALLBACKS if issubclass(cls, Observer)]

# Other arguments than the defaults, and arguments to refuse.
OTHER = {
    "ActivationStatsMonitor": {"modules": "blocks.*"},
    "AttentionEntropyMonitor": {"every_n_steps": 1, "collapse_ratio": 0.3},
    "Dashboard": {"every_n_steps": 2},
    "DeadNeuronDetector": {"every_n_steps": 1, "window_tokens": 1},
    "GradientNormLogger": {"every_n_steps": 1, "groups": ["parameters", "*.bias"]},
    "ParameterStatsLogger": {"every_n_steps": 1, "groups": ["kinds"]},
    "ThroughputLogger": {"every_n_steps": 1},
    "AdaptiveGradientClipping": {"every_n_steps": 1, "warmup_steps": 2},
    "LossSpikeRecovery": {"rule": SixSigma(), "patience": 4},
    "NonFiniteAutopsy": {"max_reports": 2},
    "NonFiniteGuard": {"patience": 4},
    "LossCurve": {"filename": "b.png"},
    "EarlyStoppingWithRestore": {"patience": 3},
    "ExactResume": {"allow_changes": True},
    "GracefulShutdown": {"grace_seconds": 30.0},
    "GradualUnfreezing": {"epochs": [1]},
    "Heartbeat": {"every_seconds": 2.0},
    "RecipeCheck": {"not_learning_after": 2, "silence": ["no-warmup"]},
    "SequenceLengthCurriculum": {"start": 3, "growth": 2, "grow_every_n_steps": 2, "multiple_of": 1},
    "VerifiedCheckpoint": {"every_n_train_steps": 3},
}
BAD = {
    "ActivationStatsMonitor": [{"every_n_steps": 0}, {"modules": ""}],
    "AttentionEntropyMonitor": [
        {"every_n_steps": 0},
        {"collapse_ratio": 1.0},
        {"collapse_logit": 0.0},
        {"uniform_after": 0},
    ],
    "Dashboard": [{"every_n_steps": 0}, {"alert_every_minutes": -1.0}],
    "DeadNeuronDetector": [{"every_n_steps": 0}, {"tau": 1.0}, {"tau": 0}, {"window_tokens": 0}],
    "GradientNormLogger": [{"every_n_steps": 0}, {"groups": [""]}, {"vanishing_rms": -1.0}, {"exploding_ratio": 1.0}],
    "ParameterStatsLogger": [{"every_n_steps": 0}, {"groups": [""]}],
    "ThroughputLogger": [{"every_n_steps": 0}],
    "AdaptiveGradientClipping": [
        {"alpha": 1.0},
        {"z_threshold": 0.0},
        {"max_grad_norm": 0.0},
        {"warmup_steps": 1},
        {"every_n_steps": 0},
    ],
    "LossSpikeRecovery": [
        {"patience": 2},
        {"snapshot_every_n_steps": 0},
        {"keep_snapshots": 1},
        {"prove_steps": -1},
        {"max_rollbacks": 0},
        {"budget_steps": 0},
        {"cooldown_steps": 0},
    ],
    "NonFiniteAutopsy": [{"max_reports": 0}],
    "NonFiniteGuard": [{"patience": 0}],
    "LossCurve": [{"every_n_steps": -1}, {"filename": "folder/name.png"}],
    "EarlyStoppingWithRestore": [{"patience": 0}, {"mode": "low"}, {"min_delta": -1.0}],
    "ExactResume": [],
    "RecipeCheck": [{"not_learning_after": 0}, {"silence": ["no"]}],
    "Heartbeat": [{"every_seconds": 0.0}, {"hang_seconds": 0.0}, {"hang_factor": 1.0}],
    "GradualUnfreezing": [{"stages": []}, {"epochs": [0]}, {"lr_scales": [1.0]}],
    "GracefulShutdown": [{"time_limit": 0.0}, {"grace_seconds": 0.0}],
    "SequenceLengthCurriculum": [
        {"start": 0},
        {"growth": 0},
        {"grow_every_n_steps": 0},
        {"grow_every_n_epochs": -1},
        {"grow_every_n_steps": 5, "grow_every_n_epochs": 1},
        {"max_length": 64},
        {"multiple_of": 0},
        {"keys": []},
        {"every_n_steps": 0},
    ],
    "VerifiedCheckpoint": [{"save_top_k": 0}, {"max_failures": 0}],
}
FAULT = {5: "nan"}
ALONE = {"AdaptiveGradientClipping", "LossSpikeRecovery", "SequenceLengthCurriculum"}  # two in one trainer are refused

each = pytest.mark.parametrize("cls", CALLBACKS)
each_observer = pytest.mark.parametrize("cls", OBSERVERS)


def with_company(make_trainer, callbacks, **options):
    """A trainer in which the callbacks have what they need beside them."""
    if any(isinstance(callback, lit_callbacks.GracefulShutdown) for callback in callbacks):
        callbacks = [*callbacks, lit_callbacks.VerifiedCheckpoint()]
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    return make_trainer(callbacks=callbacks, enable_checkpointing=saves, **options)


def fit(make_trainer, callbacks, **options):
    torch.manual_seed(0)
    module = TinyLM(dropout=0.1)
    trainer = with_company(make_trainer, callbacks, **{"max_epochs": 1, **options})
    trainer.fit(module, loader(faults=FAULT, n_samples=24), loader(n_samples=8))
    return module, trainer


class SavesNow(Callback):
    """What GracefulShutdown needs, under either name of Lightning."""

    def save_now(self, trainer, place="between_steps"):
        return None


def hooks(module):
    return [
        len(getattr(m, name))
        for m in module.modules()
        for name in vars(m)
        if name.endswith("_hooks") and isinstance(getattr(m, name), dict)
    ]


def documented_keys(cls):
    """Key to description; a key may hold <layer> or <group>."""
    section = inspect.getdoc(cls).partition("\nLogs")[2].partition("\nArgs:")[0]
    found = re.split(r"^    (\w+/\S+): ", section, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def undocumented(cls, keys):
    patterns = [re.sub(r"<\w+>", r"\\w+", key) for key in documented_keys(cls)]
    return {key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)}


@pytest.mark.parametrize("cls", [cls for cls in CALLBACKS if not issubclass(cls, Checkpoint)])
def test_arguments_have_defaults_plain_annotations_and_attributes_of_their_name(cls):
    callback = cls()
    for name, parameter in inspect.signature(cls).parameters.items():
        assert getattr(callback, name) == parameter.default
    hints = typing.get_type_hints(cls.__init__)
    plain = {int, float, str, bool, type(None), int | None, str | None, float | None, SpikeRule | None}
    plain |= {list[str] | None, list[int] | None, list[float] | None}
    assert set(hints.values()) <= plain


@each
def test_bad_arguments_are_refused_by_value(cls):
    for arguments in BAD[cls.__name__]:
        (name, value), *_ = arguments.items()
        with pytest.raises(ValueError, match=f"{name} must be .*got {re.escape(repr(value))}"):
            cls(**arguments)


@each
def test_state_survives_a_safe_round_trip(cls, make_trainer, tmp_path):
    callback = cls(**OTHER[cls.__name__])
    fit(make_trainer, [callback])
    state = callback.state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    other = cls(**OTHER[cls.__name__])
    other.load_state_dict(loaded)
    fit(make_trainer, [other])
    loaded, state = (tree_map_only(str, lambda text: sum(text.encode()), value) for value in (loaded, state))
    torch.testing.assert_close(loaded, state, rtol=0, atol=0, equal_nan=True)


@each
def test_two_of_a_class_keep_separate_states(cls, make_trainer, tmp_path):
    first, second = cls(), cls(**OTHER[cls.__name__])
    assert first.state_key != second.state_key
    if cls.__name__ in ALONE:
        with pytest.raises(lit_callbacks.SetupError, match=cls.__name__):
            fit(make_trainer, [first, second])
        return
    _, trainer = fit(make_trainer, [first, second])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert sum(key.startswith(cls.__name__) for key in saved) == (2 if first.state_dict() else 0)


@each
def test_survives_pickle_before_and_after_two_fits(cls, make_trainer):
    callback = pickle.loads(pickle.dumps(cls(**OTHER[cls.__name__])))
    for _ in range(2):
        fit(make_trainer, [callback])
        pickled = pickle.dumps(callback)
        assert b"TinyLM" not in pickled, "the module is not carried along"
        callback = pickle.loads(pickled)


@each
def test_validates_and_tests_on_their_own(cls, make_trainer):
    logger = MemoryLogger()
    trainer = with_company(make_trainer, [cls()], logger=logger)
    (validated,) = trainer.validate(TinyLM(), loader(), verbose=False)
    (tested,) = trainer.test(TinyLM(), loader(), verbose=False)
    measured = set(validated) - {"val/loss"}
    assert measured == set(tested) - {"test/loss"}
    assert undocumented(cls, measured) == set()
    assert bool(measured) == (cls in OBSERVERS and "``validate``" in inspect.getdoc(cls))
    assert measured <= {key for _, metrics in logger.calls for key in metrics}


@each
@pytest.mark.parametrize("breaks", [False, True])
def test_leaves_no_hooks_behind(cls, make_trainer, breaks):
    class Break(Callback):
        def on_train_batch_end(self, *args):
            if breaks:
                raise KeyError("broken")

    callback, module = cls(), TinyLM()
    before = hooks(module)
    trainer = with_company(make_trainer, [callback, Break()], max_steps=3)
    try:
        trainer.fit(module, loader(faults=FAULT))
    except KeyError:
        assert breaks
    assert trainer.global_step == (1 if breaks else 3)
    assert hooks(module) == before
    assert torch.overrides._len_torch_function_stack() == 0
    pickle.dumps(callback)


@pytest.mark.parametrize("cls", [cls for cls in CALLBACKS if not issubclass(cls, Checkpoint)])
@pytest.mark.parametrize(("package", "module"), [(lightning.pytorch, TinyLM), (pytorch_lightning, OldTinyLM)])
def test_works_under_both_names_of_lightning(cls, package, module, make_trainer):
    callbacks = [cls(**OTHER[cls.__name__])]
    if cls is lit_callbacks.GracefulShutdown:
        callbacks.append(SavesNow())
    trainer = make_trainer(package=package, max_steps=4, callbacks=callbacks)
    trainer.fit(module(), loader(faults=FAULT), loader(n_samples=8))
    assert trainer.global_step == 4


@each_observer
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_observers_change_nothing(cls, make_trainer, precision):
    def run(callbacks):
        torch.manual_seed(0)
        module = TinyLM(dropout=0.1)
        trainer = make_trainer(max_epochs=1, callbacks=callbacks, precision=precision)
        trainer.fit(module, loader(n_samples=24), loader(n_samples=8))
        return [*snapshot(module, trainer), torch.get_rng_state()]

    (*without, rng_without), (*watched, rng_watched) = run([]), run([cls(every_n_steps=1)])
    assert_identical(watched, without)
    assert torch.equal(rng_watched, rng_without)


@each
def test_emits_the_keys_it_documents(cls, make_trainer):
    logger = MemoryLogger()
    options = {"window_tokens": 1} if cls is lit_callbacks.DeadNeuronDetector else {}
    trainer = with_company(make_trainer, [cls(**options)], max_steps=4, logger=logger)
    trainer.fit(TinyLM(), loader(faults=FAULT))
    keys = {key for _, metrics in logger.calls for key in metrics}
    assert undocumented(cls, keys) == set()
    for key, description in documented_keys(cls).items():
        sometimes = re.search("absent while|only on a GPU|only with|with ``histograms`` only", description)
        assert sometimes or any(re.fullmatch(re.sub(r"<\w+>", r"\\w+", key), k) for k in keys), key
    monitored = {key for key, description in documented_keys(cls).items() if "trainer.callback_metrics" in description}
    assert set(trainer.callback_metrics) == monitored


@each
def test_metric_keys_have_a_section_and_a_plain_last_part(cls):
    for key in documented_keys(cls):
        assert re.fullmatch(r"[a-z_0-9]+/[A-Za-z0-9_<>]+", key)


@each
def test_the_catalogue_has_a_row_with_its_keys(cls):
    catalogue = (PACKAGE.parent / "README.md").read_text()
    (row,) = re.findall(rf"^\| `{cls.__name__}\(.*", catalogue, re.MULTILINE)
    assert all(f"`{key}`" in row for key in documented_keys(cls))


def test_all_is_sorted_and_complete():
    assert lit_callbacks.__all__ == sorted(lit_callbacks.__all__)
    assert all(thing.__module__.startswith("lit_callbacks.") and thing.__doc__ for thing in PUBLIC)
    assert {type(callback) for callback in lit_callbacks.recommended()} <= set(CALLBACKS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_sources_import_only_what_they_may_and_never_print(path):
    tree = ast.parse(path.read_text())
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in calls
    imports = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports.add(node.module.partition(".")[0])
    third_party = imports - sys.stdlib_module_names
    if path.parent.name == "functional":
        assert third_party <= {"torch", "lit_callbacks"}
    optional = {"deepspeed", "matplotlib", "numpy", "safetensors", "tensorboard", "wandb", "wandb_workspaces", "yaml"}
    assert third_party <= {"torch", "lightning", "torchmetrics", "lit_callbacks"} | optional
    at_import = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    late = optional - ({"numpy"} if path.parent.name in ("health", "report") else set())
    assert not any(module.startswith(tuple(late)) for module in at_import), "imported where it is used"

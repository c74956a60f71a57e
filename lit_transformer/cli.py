"""The command line: ``python cli.py fit|validate|test|predict|check|plot_schedule|lr_find|batch_size_find|…``."""

import sys
from collections.abc import Sequence

from lit_transformer.errors import TrainingStopped, UsageError

_OVERVIEW = """usage: {program} COMMAND [--config FILE] [--KEY VALUE ...]

Train transformers that do not blow up.

  fit        train; without --config, what configs/default.yaml says
  validate   evaluate a checkpoint on the validation text
  test       evaluate a checkpoint on the test text
  predict    score every block of the test text, into predictions.csv
  check      what is wrong with the recipe that fit would train by, and what to do about it
  plot_schedule
             the learning rate of each group over the run that fit would make, as a picture
  lr_find    train at ever higher learning rates for some 200 steps, and suggest one
  batch_size_find
             try ever larger batches, and suggest the largest that fits
  report     what became of a run, as one HTML file: the verdict, the loss and its events, every layer
  memory     what each strategy holds on a device: parameters, gradients, states, activations; what fits
  generate   write text from a prompt
  export     the weights of a checkpoint as safetensors with digests, or as Hugging Face loads them
  consolidate
             a checkpoint that a sharded run saved in parts, as one file
  dashboard  save a W&B workspace with the charts that matter

{program} COMMAND --help lists the settings of a command; fit --print_config prints them all with their values.
--config takes a file, or the name of a shipped one ({names}); more than one are merged, flags win.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command, and exit with a code that says how it ended.

    Errors that a person can fix are one paragraph and exit code 2; a run that recovery has stopped, exit code 3; Ctrl-C
    is exit code 130.

    Args:
        args: The words after the program's name; those of the process by default.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        _run(words)
    except UsageError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
    except TrainingStopped as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(words: list[str]) -> None:
    from lit_transformer.run.config_files import shipped_names
    from lit_transformer.run.report import program_name

    if not words or words[0] in ("-h", "--help"):
        print(_OVERVIEW.format(program=program_name(), names=", ".join(shipped_names())))
    elif words[0] == "generate":
        from lit_transformer.commands.generate import main as generate

        generate(words[1:])
    elif words[0] == "report":
        from lit_transformer.commands.report import main as report

        report(words[1:])
    elif words[0] == "export":
        from lit_transformer.commands.export import main as export

        export(words[1:])
    elif words[0] == "consolidate":
        from lit_transformer.commands.consolidate import main as consolidate

        consolidate(words[1:])
    elif words[0] == "dashboard":
        from lit_transformer.commands.dashboard import main as dashboard

        dashboard(words[1:])
    elif words[0] == "check":
        from lit_transformer.commands.check import main as check

        check(words[1:])
    elif words[0] == "lr_find":
        from lit_transformer.commands.lr_find import main as lr_find

        lr_find(words[1:])
    elif words[0] == "batch_size_find":
        from lit_transformer.commands.batch_size_find import main as batch_size_find

        batch_size_find(words[1:])
    elif words[0] == "memory":
        from lit_transformer.commands.memory import main as memory

        memory(words[1:])
    elif words[0] == "plot_schedule":
        from lit_transformer.commands.plot_schedule import main as plot_schedule

        plot_schedule(words[1:])
    else:
        from lit_transformer.commands.training import run_training_command

        run_training_command(words)

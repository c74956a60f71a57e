"""The command line: ``python cli.py fit --config configs/default.yaml``."""

from lit_transformer.cli import main

if __name__ == "__main__":
    main()

"""``python -m lorry`` is the program ``lorry``."""

from lorry.cli.main import app

if __name__ == "__main__":
    app(prog_name="lorry")

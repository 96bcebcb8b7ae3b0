"""A window to talk to a model that runs on this machine. See README.md beside this file.

    python desktop.py [FOLDER ...]

Each FOLDER is a bundle that `edgelm export` wrote, or holds several. Without any, `models` beside the program is used.
"""

from __future__ import annotations

import argparse
import sys
import tkinter as tk
from pathlib import Path

from conversations import Store, data_folder
from look import sharpen
from models import Models
from window import Window
from worker import Worker

from edgelm.runtime import GenerationSettings


def main() -> None:
    parser = argparse.ArgumentParser(description="a window to talk to a model on this machine")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a bundle, or a folder of bundles")
    parser.add_argument("--data", type=Path, default=data_folder(), help="where conversations are kept (%(default)s)")
    parser.add_argument("--dark", action="store_true", help="begin with the dark colours")
    given = parser.parse_args()
    store = Store(given.data / "conversations")
    models = Models(given.folders or [beside() / "models"], given.data)
    sharpen()
    root = tk.Tk()
    worker = Worker(GenerationSettings(max_tokens=1024))
    window = Window(root, worker, store, models, given.dark)
    if models.by_name:
        window.open_model(next(iter(models.by_name)))
    root.mainloop()


def beside() -> Path:
    """The folder of the program, frozen or not."""
    return Path(sys.executable if getattr(sys, "frozen", False) else __file__).resolve().parent


if __name__ == "__main__":
    main()

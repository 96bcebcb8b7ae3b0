"""A chat window for a model that runs on this machine. See README.md in this folder.

    python desktop.py [FOLDER ...]

Each FOLDER is a bundle written by `edgelm export`, or a folder of bundles. The default is `models` beside the program.
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
    parser = argparse.ArgumentParser(description="a chat window for a model on this machine")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a bundle, or a folder of bundles")
    parser.add_argument("--data", type=Path, default=data_folder(), help="folder for conversations (%(default)s)")
    parser.add_argument("--dark", action="store_true", help="start with dark colours")
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

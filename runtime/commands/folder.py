"""The arguments that name a model, the same for each command that loads one."""

from __future__ import annotations

import argparse
from typing import Any


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Declare `bundle`, the folder, and `--graph`."""
    parser.add_argument("bundle", help="folder that  edgelm export  or optimum wrote")
    parser.add_argument(
        "--graph", metavar="FILE", help="the ONNX file to use, if a folder of another exporter has several"
    )


def add_provider(parser: argparse.ArgumentParser) -> None:
    """Declare `--provider`."""
    parser.add_argument("--provider", metavar="NAME", help="cpu or cuda (the one that the bundle was made for)")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Declare how the model is loaded: `--prepare` and `--inexact`."""
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="keep the weights in this machine's form, in twice the bundle's disk space: later loads are faster",
    )
    parser.add_argument(
        "--inexact",
        action="store_true",
        help="use batches, prefixes and draft tokens also where they change roundings, as with fp32",
    )


def loading_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """These options as keywords of `load`."""
    return {"prepare": True if arguments.prepare else None, "exact": not arguments.inexact}

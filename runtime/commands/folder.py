"""The arguments that name a model, the same for each command that loads one."""

from __future__ import annotations

import argparse


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Declare `bundle`, the folder, and `--graph`."""
    parser.add_argument("bundle", help="folder that  edgelm export  wrote, or optimum")
    parser.add_argument(
        "--graph", metavar="FILE", help="the ONNX file to take, in a folder of another exporter that holds several"
    )


def add_provider(parser: argparse.ArgumentParser) -> None:
    """Declare `--provider`."""
    parser.add_argument("--provider", metavar="NAME", help="compute on cpu or cuda (what the bundle was made for)")

"""`optimum-cli export edgelm MODEL`: the same as `edgelm export MODEL`, for users of optimum.

optimum-cli finds commands as modules of `optimum.commands.register`, a namespace to which any distribution may add, and
knows no entry points. So this file is installed there, without an `__init__.py` anywhere (PEP 420).
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from edgelm.export.commands import export
from edgelm.runtime.cli import add_debug, one_line_errors


class EdgelmExportCommand(BaseOptimumCLICommand):
    """The command, in the form that optimum-cli wants."""

    COMMAND = CommandInfo(name="edgelm", help=f"edgelm: {export.SUMMARY}.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments of `edgelm export`."""
        export.add_arguments(parser)
        add_debug(parser)

    def run(self) -> None:
        """Export, and end the program with the exit status of `edgelm export`."""
        sys.exit(one_line_errors(lambda: export.run(self.args), self.args.debug))


REGISTER_COMMANDS = [(EdgelmExportCommand, ExportCommand)]

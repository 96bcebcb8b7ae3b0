"""`optimum-cli export edgelm MODEL`: the same as `edgelm export MODEL`, for those who export with optimum.

optimum-cli looks for commands in the namespace `optimum.commands.register`, to which any distribution may add modules.
Neither this folder nor those above it may have an `__init__.py` (PEP 420).
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from edgelm.export.commands import export
from edgelm.runtime.errors import EdgelmError


class EdgelmExportCommand(BaseOptimumCLICommand):
    """The command, in the form that optimum-cli wants."""

    COMMAND = CommandInfo(name="edgelm", help=f"edgelm: {export.SUMMARY}.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments of `edgelm export`."""
        export.add_arguments(parser)

    def run(self) -> None:
        """Export. Ends the program with status 1 and one line on standard error for what edgelm raises on purpose."""
        try:
            export.run(self.args)
        except EdgelmError as error:
            sys.exit(f"optimum-cli: error: {' '.join(str(error).split())}")


REGISTER_COMMANDS = [(EdgelmExportCommand, ExportCommand)]

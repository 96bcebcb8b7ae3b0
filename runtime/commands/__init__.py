"""The runtime's command line modules, one command a file: SUMMARY, add_arguments(parser) and run(arguments) -> int.

They parse, call the library and print. No other module prints.
"""

"""The exporter's command line modules, found by the runtime's `edgelm` through entry points."""

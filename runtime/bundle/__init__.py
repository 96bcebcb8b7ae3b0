"""The bundle: its folder, manifest, graphs and report."""

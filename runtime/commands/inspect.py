"""`edgelm inspect`: what a bundle is, from its manifest, without loading the model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter

from ..bundle import Bundle
from ..manifest import LayerCache, Manifest

SUMMARY = "show what a bundle is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", help="folder that  edgelm export  wrote")
    parser.add_argument("--json", action="store_true", help="print the manifest and the digest as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read the manifest and print it for a person or a program."""
    bundle = Bundle.open(arguments.bundle)
    manifest = bundle.manifest
    if arguments.json:
        print(json.dumps({"digest": manifest.digest, **dataclasses.asdict(manifest)}, ensure_ascii=False))
        return 0
    rows = {
        "name": manifest.name,
        "digest": manifest.digest,
        "source": _source(manifest),
        "target": manifest.target.name,
        "quantization": _quantization(manifest),
        "parameters": f"{manifest.model.parameters:,}",
        "vocabulary": f"{manifest.model.vocab_size:,} tokens",
        "context": f"{manifest.model.context_length:,} tokens",
        "layers": _layers(manifest),
        "cache": _cache(manifest),
        "size": f"{bundle.total_bytes() / 1e6:,.1f} MB",
        **_quality(manifest),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    for key, value in rows.items():
        print(f"{key:14}{value}")
    for name, entry in manifest.files.items():
        print(f"  {entry.bytes:>14,}  {name}")
    return 0


def _source(manifest: Manifest) -> str:
    source = manifest.source
    extra = [item for item in (source.revision, source.license) if item]
    return f"{source.model} ({', '.join([source.architecture, *extra])})"


def _quantization(manifest: Manifest) -> str:
    excluded = manifest.quantization.excluded
    return manifest.quantization.scheme + (f", {len(excluded)} matrices in a wider type" if excluded else "")


def _layers(manifest: Manifest) -> str:
    kinds = Counter(map(_layer, manifest.model.layers))
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _layer(layer: LayerCache | None) -> str:
    if layer is None:
        return "no attention"
    window = f", window {layer.window}" if layer.window else ""
    return f"{layer.kv_heads} KV heads of {layer.key_size}{window}"


def _cache(manifest: Manifest) -> str:
    kv = manifest.model.kv
    width = 1 if kv.type == "int8" else 4
    sizes = [
        layer.kv_heads * (layer.key_size + layer.value_size) for layer in manifest.model.layers if layer is not None
    ]
    return f"{kv.type}{' per ' + kv.granularity if kv.granularity else ''}, {sum(sizes) * width:,} bytes a token"


def _quality(manifest: Manifest) -> dict[str, str]:
    quality = manifest.quality.get("against_fp32")
    keys = ("perplexity_before", "perplexity_after", "perplexity_increase_percent", "agreement_percent")
    if not isinstance(quality, dict) or not all(isinstance(quality.get(key), (int, float)) for key in keys):
        return {}
    return {
        "quality": f"perplexity {quality['perplexity_before']:.3f} -> {quality['perplexity_after']:.3f} "
        f"({quality['perplexity_increase_percent']:+.2f} %), "
        f"same most likely token at {quality['agreement_percent']:.1f} %"
    }

"""Serve bundles with replicas on the machines of a Ray cluster: the application of `edgelm serve` below Ray Serve.

    python scripts/serve_on_ray.py BUNDLE [NAME=BUNDLE ...] [--replicas 3] [--cpus 2] [--address auto]
        [--host 127.0.0.1] [--port 8000] [--api-key-file FILE] [--allow-host NAME] [--redis URL]

Needs the extras `cluster` and `serve`. Each replica is a process with so many cores that has loaded all bundles; every
machine must see their folders. Ray restarts replicas that end. --address joins a cluster; without it, one is started on
this machine. A request goes to the less busy of two replicas, so a conversation may not find the prefix that another
replica holds: docs/fleet.md compares this with a proxy that hashes conversations.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelm.runtime import ResponseCacheSettings, load
from edgelm.runtime.cli import one_line_errors
from edgelm.runtime.commands.serve import find_bundles, read_keys
from edgelm.runtime.errors import SettingsError
from edgelm.runtime.server import ServerSettings, app
from edgelm.runtime.server.settings import LOOPBACK_HOSTS

# As long as a replica's own queue; beyond that, Ray holds requests back.
MAX_ONGOING = 64


def build(bundles: Mapping[str, str], settings: ServerSettings, cpus: int, redis_url: str | None) -> Any:
    """The ASGI application of a replica with all bundles loaded; only then does Ray send requests to it."""
    answers: bool | ResponseCacheSettings = True if redis_url is None else ResponseCacheSettings(redis_url=redis_url)
    engines = {
        name: load(path, threads=cpus, response_cache=answers, prefix_cache=True) for name, path in bundles.items()
    }
    return app(engines, settings)


def deployment(
    bundles: Mapping[str, Path],
    settings: ServerSettings,
    *,
    replicas: int = 1,
    cpus: int = 1,
    redis_url: str | None = None,
) -> Any:
    """The Ray Serve application of the bundles, for `serve.run`."""
    from ray import serve

    folders = {name: str(path.resolve()) for name, path in bundles.items()}

    def application() -> Any:  # Ray accepts only a function as an application factory, no other callable
        return build(folders, settings, cpus, redis_url)

    @serve.ingress(application)
    class Edgelm:
        """One replica; the application answers."""

    deployed = serve.deployment(
        num_replicas=replicas, ray_actor_options={"num_cpus": cpus}, max_ongoing_requests=MAX_ONGOING
    )(Edgelm)
    return deployed.bind()


def main() -> int:
    """Deploy, and wait for a signal to end."""
    arguments = parse()
    keys = () if arguments.api_key_file is None else read_keys(arguments.api_key_file)
    local = arguments.host in ("127.0.0.1", "localhost")
    if not local and not keys:
        raise SettingsError(f"{arguments.host} may be reached from other machines: give --api-key-file")
    hosts = (*(LOOPBACK_HOSTS if local else ()), *arguments.allow_host) or None
    import ray
    from ray import serve

    ray.init(address=arguments.address, include_dashboard=False)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    application = deployment(
        find_bundles(arguments.bundles),
        ServerSettings(api_keys=keys, hosts=hosts),
        replicas=arguments.replicas,
        cpus=arguments.cpus,
        redis_url=arguments.redis,
    )
    serve.run(application, blocking=True)
    return 0


def parse() -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="folder of a bundle, or NAME=FOLDER")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=2, help="cores of a replica (2)")
    parser.add_argument("--address", help="address of a Ray cluster, such as auto (start one here)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-file", type=Path, metavar="FILE")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME")
    parser.add_argument("--redis", metavar="URL")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(one_line_errors(main, False))

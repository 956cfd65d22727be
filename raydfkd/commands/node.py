"""Commands for a machine of a cluster: node-watch."""

from __future__ import annotations

import logging
from functools import partial
from typing import Annotated, Literal

import typer

from raydfkd.commands.output import DONE, INCOMPLETE


def node_watch(
    provider: Annotated[
        Literal["auto", "aws", "gcp"], typer.Option(help="Its cloud; auto takes the one that answers.")
    ] = "auto",
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 3.0,
    rebalance: Annotated[
        bool, typer.Option("--rebalance", help="Take AWS's rebalance recommendation, which is earlier, as a notice.")
    ] = False,
    node_id: Annotated[
        list[str] | None, typer.Option(help="Ray node to drain; repeatable [default: all of this machine].")
    ] = None,
    metadata_url: Annotated[str | None, typer.Option(hidden=True, help="Another metadata server, for tests.")] = None,
) -> int:
    """Wait for a spot machine's notice and drain its Ray nodes, so that work is saved before it goes."""
    from raydfkd.spot.drain import RAY, drain_nodes, local_nodes, watch
    from raydfkd.spot.notices import provider_of

    logger = logging.getLogger("raydfkd")
    logger.setLevel(logger.level or logging.INFO)
    drain = partial(drain_nodes, nodes=partial(local_nodes, node_id or ()), ray=RAY)
    try:
        is_drained = watch(provider_of(provider, metadata_url, rebalance=rebalance), drain, every_s=every)
    except KeyboardInterrupt:
        return DONE
    return DONE if is_drained else INCOMPLETE

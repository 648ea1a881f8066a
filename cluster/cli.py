"""The `baton` command.

Knows: arguments and exit codes (0 done, 1 failed, 2 the arguments or the configuration cannot work). Does not know: how anything is done;
each command imports what it needs, so that `baton --help` is instant.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from baton.config import BatonConfig, load_config
from baton.errors import BatonError, ConfigError
from cluster.settings import description, documented_defaults

# flag, setting, type. What a flag means is said once, in baton/config.py.
_SETTINGS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("--model", "model", str),
    ("--served-model-name", "served_model_name", str),
    ("--host", "router.host", str),
    ("--http-port", "router.http_port", int),
    ("--grpc-port", "router.grpc_port", int),
    ("--dtype", "dtype", str),
    ("--quantization", "quantization", str),
    ("--max-model-len", "max_model_len", int),
    ("--kv-memory", "kv_memory", str),
    ("--block-size", "block_size", int),
    ("--prefill-nodes", "prefill.nodes", int),
    ("--prefill-tp", "prefill.tp", int),
    ("--prefill-moe", "prefill.moe", str),
    ("--decode-nodes", "decode.nodes", int),
    ("--decode-dp", "decode.dp", int),
    ("--decode-tp", "decode.tp", int),
    ("--max-step-tokens", "prefill.max_step_tokens", int),
    ("--transport", "transfer.transport", str),
    ("--ray-address", "ray.address", str),
    ("--log-level", "log_level", str),
)
_GRPC_ADDRESS = "127.0.0.1:8001"
# Adds commands to the table; given the options that all commands share.
Add = Callable[[Any, argparse.ArgumentParser], None]


def main(argv: Sequence[str] | None = None, more: Sequence[Add] = ()) -> int:
    """Run one command; the exit code. more: adds the commands of whoever lives above this floor (baton/__main__.py)."""
    arguments = parser(more).parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone
        return 1
    except BatonError as error:
        _explain(error, verbose=arguments.verbose)
        return 2 if isinstance(error, ConfigError) else 1


def parser(more: Sequence[Add] = ()) -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser(prog="baton", description="Serves large language models with prefill and decode on different machines.")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--verbose", action="store_true", help="show the logs of all processes, and tracebacks")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands, shared)
    _add_deployment(commands, shared)
    _add_upkeep(commands, shared)
    _add_talk(commands, shared)
    fingerprint = commands.add_parser("fingerprint", parents=[shared], help="print the number by which nodes compare their checkpoints")
    fingerprint.add_argument("model", metavar="MODEL", help="checkpoint directory as transformers saves it")
    fingerprint.add_argument("--full", action="store_true", help="read every byte of the weights instead of samples; another number")
    fingerprint.set_defaults(run=_fingerprint)
    config = commands.add_parser("config", parents=[shared], help="print every setting with its default and meaning, as YAML")
    config.set_defaults(run=_config)
    for add in more:
        add(commands, shared)
    return top


def config_from(arguments: argparse.Namespace) -> BatonConfig:
    """The configuration file, with what the command line says laid over it. Raises ConfigError."""
    given = vars(arguments)
    overrides = {setting: given[setting] for _, setting, _ in _SETTINGS if given.get(setting) is not None}
    if given.get("api_key"):
        overrides["router.api_keys"] = tuple(given["api_key"])
    if given.get("insecure"):
        overrides["router.insecure"] = True
    if not arguments.config and "model" not in overrides:
        raise ConfigError("say which model to serve: --model DIR, or --config FILE")
    return load_config(arguments.config, overrides)


def _add_serve(commands: Any, shared: argparse.ArgumentParser) -> None:
    serve = commands.add_parser("serve", parents=[shared], help="serve a model on this machine until Ctrl-C")
    serve.add_argument("--config", metavar="FILE", help="YAML file of settings; see `baton config`. Arguments win over it")
    for flag, setting, kind in _SETTINGS:
        serve.add_argument(flag, dest=setting, type=kind, metavar=_metavar(kind), help=description(setting))
    serve.add_argument("--api-key", action="append", metavar="KEY", help=description("router.api_keys") + "; may be repeated")
    serve.add_argument("--insecure", action="store_true", help=description("router.insecure"))
    serve.set_defaults(run=_serve)


def _add_deployment(commands: Any, shared: argparse.ArgumentParser) -> None:
    ray = argparse.ArgumentParser(add_help=False, parents=[shared])
    ray.add_argument(
        "--ray-address", dest="ray.address", metavar="HOST:PORT", help="the Ray cluster; default: RAY_ADDRESS, or the one here"
    )
    ray.add_argument("--name", default="default", help="name of the Baton cluster, where one Ray cluster holds several (default: default)")
    up = commands.add_parser("up", parents=[ray], help="start a cluster on an existing Ray cluster, and leave it there")
    up.add_argument("config", metavar="FILE", help="YAML file of settings; see `baton config`")
    up.set_defaults(run=_up)
    status = commands.add_parser("status", parents=[ray], help="show a cluster on an existing Ray cluster, or a served one by --address")
    status.add_argument("--address", metavar="HOST:PORT", help="gRPC address of a running cluster; asks it instead of Ray")
    status.add_argument("--api-key", metavar="KEY", help="key to present")
    status.set_defaults(run=_status)
    down = commands.add_parser("down", parents=[ray], help="take down a cluster on an existing Ray cluster, and prove that nothing is left")
    down.set_defaults(run=_down)


def _add_upkeep(commands: Any, shared: argparse.ArgumentParser) -> None:
    admin = argparse.ArgumentParser(add_help=False, parents=[shared])
    admin.add_argument("--address", default=_GRPC_ADDRESS, metavar="HOST:PORT", help=f"gRPC address of a cluster (default {_GRPC_ADDRESS})")
    admin.add_argument("--api-key", metavar="KEY", help="key to present")
    drain = commands.add_parser("drain", parents=[admin], help="take a node out of service: its work ends or goes on elsewhere")
    drain.add_argument("node", metavar="NODE", help="say, decode-0")
    drain.add_argument("--timeout-s", type=float, default=60.0, metavar="S", help="seconds its work gets to end by itself (default 60)")
    drain.add_argument("--keep", action="store_true", help="leave its processes; otherwise they end, and their slots are given back")
    drain.set_defaults(run=_drain)
    restore = commands.add_parser("restore", parents=[admin], help="take a drained node back, building it anew if its processes ended")
    restore.add_argument("node", metavar="NODE", help="say, decode-0")
    restore.add_argument("--timeout-s", type=float, default=300.0, metavar="S", help="seconds to wait until it serves (default 300)")
    restore.set_defaults(run=_restore)
    flush = commands.add_parser("flush-cache", parents=[admin], help="forget cached prefixes that no sequence uses, on a running cluster")
    flush.add_argument("node", nargs="?", default="", help="say, prefill-0; default: all nodes")
    flush.set_defaults(run=_flush_cache)


def _add_talk(commands: Any, shared: argparse.ArgumentParser) -> None:
    client = argparse.ArgumentParser(add_help=False, parents=[shared])
    client.add_argument(
        "--address", default=_GRPC_ADDRESS, metavar="HOST:PORT", help=f"gRPC address of a cluster (default {_GRPC_ADDRESS})"
    )
    client.add_argument("--api-key", metavar="KEY", help="key to present")
    client.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer (default: the remaining context)")
    client.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's, else 1)")
    client.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens that hold this much probability")
    client.add_argument("--top-k", type=int, metavar="K", help="sample from the k most likely tokens")
    client.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    generate = commands.add_parser("generate", parents=[client], help="continue a text over gRPC, streaming to standard output")
    generate.add_argument("prompt", help="text to continue; - reads standard input")
    generate.set_defaults(run=_generate)
    chat = commands.add_parser("chat", parents=[client], help="chat with a running cluster over gRPC")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.set_defaults(run=_chat)


def _serve(arguments: argparse.Namespace) -> int:
    from cluster.serve import serve

    return serve(config_from(arguments), show_logs=arguments.verbose)


def _up(arguments: argparse.Namespace) -> int:
    from cluster.deploy import up

    return up(config_from(arguments), arguments.name, show_logs=arguments.verbose)


def _status(arguments: argparse.Namespace) -> int:
    if arguments.address:
        from cluster.talk import print_status

        return print_status(arguments.address, arguments.api_key)
    from cluster.deploy import status

    return status(vars(arguments)["ray.address"], arguments.name)


def _down(arguments: argparse.Namespace) -> int:
    from cluster.deploy import down

    return down(vars(arguments)["ray.address"], arguments.name)


def _drain(arguments: argparse.Namespace) -> int:
    from cluster.drain import drain

    return drain(arguments.address, arguments.api_key, arguments.node, arguments.timeout_s, keep=arguments.keep)


def _restore(arguments: argparse.Namespace) -> int:
    from cluster.drain import restore

    return restore(arguments.address, arguments.api_key, arguments.node, arguments.timeout_s)


def _generate(arguments: argparse.Namespace) -> int:
    from cluster.talk import generate

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    return generate(arguments.address, arguments.api_key, prompt, _sampling(arguments))


def _chat(arguments: argparse.Namespace) -> int:
    from cluster.talk import chat

    return chat(arguments.address, arguments.api_key, arguments.system, _sampling(arguments))


def _flush_cache(arguments: argparse.Namespace) -> int:
    from cluster.talk import flush_cache

    return flush_cache(arguments.address, arguments.api_key, arguments.node)


def _fingerprint(arguments: argparse.Namespace) -> int:
    from cluster.fingerprint import print_fingerprint

    return print_fingerprint(arguments.model, full=arguments.full)


def _config(arguments: argparse.Namespace) -> int:
    print(documented_defaults(), end="")
    return 0


def _sampling(arguments: argparse.Namespace) -> Any:
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    return {name: vars(arguments)[name] for name in names if vars(arguments)[name] is not None}


def _metavar(kind: Callable[[str], Any]) -> str:
    return "N" if kind is int else "VALUE"


def _explain(error: BatonError, *, verbose: bool) -> None:
    if verbose:
        traceback.print_exception(error)
    print(f"baton: {error.message}", file=sys.stderr)
    for note in [] if verbose else error.__notes__ if "__notes__" in vars(error) else []:
        print(note, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

"""What a prefill node and a decode group must share to work together, and what to tell people when they do not. Pure."""

from __future__ import annotations

from router.heard import Hello


def refusal(prefill: Hello, decode: Hello) -> str:
    """Why the two can never form a pair: each difference with both values, then both described in full; "" if they can."""
    theirs, ours = _facts(prefill), _facts(decode)
    differences = [f"{name}: {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name]]
    if not differences:
        return ""
    there, here = prefill.node, f"{decode.node}/{decode.group}"
    return (
        f"{there} (there) and {here} (here) differ in {'; '.join(differences)}. "
        f"{there} has {describe(prefill)}; {here} has {describe(decode)}"
    )


def describe(hello: Hello) -> str:
    """All that peers must share, in one line."""
    return ", ".join(f"{name} {value}" for name, value in _facts(hello).items())


def _facts(hello: Hello) -> dict[str, object]:
    layout = hello.layout
    return {
        "protocol version": hello.protocol_version,
        "model": hello.model_fingerprint,
        "dtype": hello.dtype,
        "quantization": hello.quantization or "none",
        "KV axes": "/".join(layout.axes),
        "block size": layout.block_size,
        "KV parts": "+".join(map(str, layout.part_dims)),
        "KV dtype": layout.dtype,
        "layers": layout.model_num_layers,
        "KV heads": layout.model_num_kv_heads,
    }

"""A prefill node: runs prompts and keeps their KV blocks readable until a decode node has pulled them."""

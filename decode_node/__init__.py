"""A decode node: pulls the KV blocks of prompts and generates tokens."""

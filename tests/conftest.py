"""What all tests share: how hypothesis searches. Nothing else is global."""

import os

from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("long", deadline=None, max_examples=10_000, print_blob=True)  # make fuzz
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")

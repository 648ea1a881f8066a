"""The production code of router, prefill and decode in one process, on a virtual clock, with faults: thousands of schedules a minute."""

"""Schedulers: custom diffusers schedulers, each file usable on its own."""

__all__: list[str] = []

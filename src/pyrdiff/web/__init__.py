"""The page of `pyrdiff demo`: `session` does the work and knows no web, `page` lays it out with gradio."""

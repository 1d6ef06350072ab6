"""
The page of `pyrdiff demo`. `session` does the work and knows no web; `page` and the tabs lay it out with gradio;
`words` and `markup` say it; `server` says who may ask for it.
"""

"""A page in the browser: erase, compare before with after, remove objects with a brush.

What it does is in `erasure.studio.session` and needs nothing more than the package; the page is in
`erasure.studio.page` and needs the extra `studio` (gradio).
"""

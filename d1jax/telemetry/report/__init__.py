"""The HTML pages: the report of a run, the denoising player, the page of an audit. Each is one file that fetches nothing.

Python computes numbers and strings, the templates in templates/ make the markup, and Jinja escapes what it is given.
"""

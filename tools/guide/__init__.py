"""The documentation's builder: chapters of the guide are run and become pages; see docs/architecture.md.

chapter.py reads chapters and translations, results.py runs them (execute.py, in processes of their own) and keeps what
they showed, page.py and figure.py make pages of it, hook.py brings the pages into MkDocs. mathml.py is the Markdown
extension for formulas, command_line.py writes the reference of the commands.
"""

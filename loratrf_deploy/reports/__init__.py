"""A parity report shown: terminal, JSON, Markdown, HTML, JUnit."""

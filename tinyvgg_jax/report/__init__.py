"""A run to look at: pictures of one of its evaluations, and a page that shows them."""

from tinyvgg_jax.report.page import write_report as write_report

__all__ = ["write_report"]

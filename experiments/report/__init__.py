"""The report of one run or several: one HTML page that stands alone, and its figures as PNG and CSV for papers.

    data.py        rows -> groups (run x family x workload x T) of entries (programs and baselines) with all figures
    charts.py      a drawing -> SVG that takes the page's colours, and PNG
    front.py       quality against time          sensitivity.py  the best s per network
    figures.py     the other charts              pictures.py     the image grids
    tables.py      summary, codecs, expected against measured, baselines
    sections.py    what stands in each section, or why it is left out
    results.py     measured tables of other commands
    page.py        the page and its files        labels.py       what things are called

Nothing here draws an image or measures anything: the report says what the outcome store holds, and leaves out the rest.
"""

from experiments.report.page import write_report

__all__ = ["write_report"]

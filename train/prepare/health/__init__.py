"""The report on a prepared set: numbers, captions, page; and the templates of all pages, which tools/report uses too."""

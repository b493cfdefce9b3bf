"""Pages and live views of a run, made from files without torch: page.py draws that of a run, html.py what all share."""

"""Pages and live views of a run. No torch here: a page is made from files."""

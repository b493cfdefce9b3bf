"""The numbers of a result document as text, for a terminal and a page alike; a sentence explains each column."""

def render_page(run): return "<html></html>"

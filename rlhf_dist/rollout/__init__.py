"""Generation engines and sampling."""

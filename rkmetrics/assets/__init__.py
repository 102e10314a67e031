"""What stands beside the code and must agree with it: pages of the manual, dashboards, rules, the catalogue's
history.

Reading: `documents` picks `dashboards` or `alerts`, over `json_text` and `yaml_text`, and gets queries with places
(`base`). Checking: `known` says what exists, `flow` where labels go, `rules` has the checks, `checking` runs them on
files, `report` writes down what they found. Moving: `tables` of renames, `migrate` for a text, `migrating` for files,
`aliases`, `catalogue_diff`. Writing: `docs` and `scrape_config`.
"""

__all__: list[str] = []

"""Style sheet of the report: light and dark, no scripts, no outside resources."""

CSS = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #60646c; --page: #fcfcfd; --line: #e4e6ea; --card: #fff;
  --before: #a8b0bd; --after: #3b6cf6; --good: #2a9d63; --bad: #d9534f; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --dim: #a0a4ab; --page: #131417; --line: #2c2f35;
  --card: #1b1d21; --before: #626a77; --after: #7196ff; --good: #4cc38a; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 0 0 8px; display: inline-block; }
section { margin-top: 36px; }
small { display: block; color: var(--dim); font-size: 12px; font-weight: 400; }
.note, .none { color: var(--dim); margin: 4px 0 12px; }
.chip { display: inline-block; border: 1px solid var(--line); border-radius: 99px; padding: 1px 10px;
  margin: 0 6px 4px 0; font-size: 12px; color: var(--dim); background: var(--card); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
th, td { text-align: left; padding: 8px 12px; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border: 0; color: var(--dim); font-size: 12px; font-weight: 500; }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
svg .track { fill: var(--line); } svg .before { fill: var(--before); } svg .after { fill: var(--after); }
svg .reach { stroke: var(--ink); stroke-width: 1.4; fill: none; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 6px; overflow: hidden; }
figcaption { font-size: 12px; color: var(--dim); margin-top: 4px; }
figure img { display: block; width: 100%; image-rendering: pixelated; border-radius: 4px; }
figure .after { margin-top: 6px; }
figure .after img { outline: 2px solid var(--line); outline-offset: -2px; }
figure .after.good img { outline-color: var(--good); } figure .after.bad img { outline-color: var(--bad); }
.veil { display: block; cursor: pointer; position: relative; }
.veil input { position: absolute; opacity: 0; }
.veil img { filter: blur(14px); transition: filter .15s; }
.veil:hover img, .veil input:checked ~ div img { filter: none; }
.veil .hint { position: absolute; top: 4px; left: 4px; font-size: 11px; padding: 0 6px; border-radius: 4px;
  background: var(--card); color: var(--dim); }
.veil:hover .hint, .veil input:checked ~ .hint { display: none; }
.veil input:focus-visible ~ .hint { outline: 2px solid var(--after); }
dl { display: flex; flex-wrap: wrap; gap: 12px; margin: 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
dt { color: var(--dim); font-size: 12px; } dd { margin: 0; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; } summary h2 { margin: 0; }
pre { overflow-x: auto; font-size: 12px; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
"""

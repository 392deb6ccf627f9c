"""The report's style sheet."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #5d6878; --rule: #e3e7ec;
  --s0: #2f6fdb; --s1: #d9592b; --s2: #1d7f4e; --s3: #9a3fbf; --s4: #8a6300; --s5: #008c9e;
  --s6: #c2255c; --s7: #5d6878; --s8: #5c7cfa; --s9: #74b816;
  --ok: #1d7f4e; --bad: #b3372f; --wait: #8a6300; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b212a; --ink: #e6eaf0; --soft: #98a3b3;
  --rule: #2d3541; --s0: #6ea3ff; --s1: #ff9566; --s2: #55c68d; --s3: #d28cf0; --s4: #e0b24c; --s5: #4fd0e0;
  --s6: #ff86ac; --s7: #a9b4c4; --s8: #91a7ff; --s9: #a9e34b;
  --ok: #55c68d; --bad: #ff7d74; --wait: #e0b24c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 40px; }
header h1 { display: inline-block; margin: 0 12px 0 0; font-size: 27px; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
header p { margin: 2px 0 18px; color: var(--soft); }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; }
.state { position: relative; top: -4px; padding: 2px 11px; border: 1px solid currentColor; border-radius: 99px;
  font-size: 13px; font-weight: 600; color: var(--wait); }
.state.complete { color: var(--ok); } .state.running { color: var(--s0); }
.state.failed, .state.diverged { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0 0 14px; }
.cards div, .chart, section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.cards div { padding: 11px 14px; }
dt, small { color: var(--soft); font-size: 12.5px; }
dd { margin: 0; font-size: 20px; font-weight: 650; font-variant-numeric: tabular-nums; line-height: 1.4;
  white-space: nowrap; }
small { display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px; }
.chart { margin: 0; padding: 12px 14px 8px; }
.chart img { width: 100%; background: #fff; }
.chart figcaption { display: flex; justify-content: space-between; font-weight: 600; font-size: 14px; }
.legend { font-weight: 400; font-size: 12.5px; color: var(--soft); }
.key { margin-left: 14px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 6px 3px 0; border-radius: 2px;
  background: var(--s0); }
.wide figcaption { display: block; } .wide .key { margin: 0 14px 0 0; display: inline-block; }
.empty { color: var(--soft); text-align: center; padding: 60px 0; }
svg { display: block; width: 100%; height: auto; margin-top: -14px; }
svg text { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); opacity: .6; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke: var(--s0); }
.band { fill: var(--s0); opacity: .18; }
circle { fill: var(--s0); }
.tables { columns: 2 440px; column-gap: 14px; margin-top: 14px; }
.losses { margin-top: 14px; }
section { break-inside: avoid; padding: 12px 16px 14px; margin: 0 0 14px; overflow-x: auto; }
.charts + section { margin-top: 14px; } .row { grid-column: 1 / -1; }
h2 { margin: 0 0 6px; font-size: 14px; }
table { width: 100%; border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; padding: 2px 12px 4px 0; }
td { vertical-align: top; padding: 4px 12px 4px 0; border-top: 1px solid var(--rule); overflow-wrap: anywhere; }
.fields tr:first-child td { border-top: 0; }
.fields td:first-child { width: 104px; color: var(--soft); overflow-wrap: normal; }
.columns td:not(:last-child) { white-space: nowrap; }
footer { color: var(--soft); font-size: 12.5px; text-align: center; margin-top: 8px; }
@media print { body { background: #fff; } .cards div, .chart, section { break-inside: avoid; } }
"""

STYLE += "".join(
    f".key.s{i}::before {{ background: var(--s{i}); }} .line.s{i} {{ stroke: var(--s{i}); }} "
    f".band.s{i}, circle.s{i} {{ fill: var(--s{i}); }}\n"
    for i in range(1, 10)
)

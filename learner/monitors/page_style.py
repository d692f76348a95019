"""How `run.html` looks: light and dark, from 320 pixels on."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #fff; --ink: #1d2127; --soft: #5b626c; --rule: #dfe2e6;
  --c1: #1f5fa8; --c2: #c8551b; --c3: #13806c; --c4: #8a3fa0; --good: #13806c; --bad: #b3261e; --wash: #f1f3f5; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2026; --ink: #e6e8eb; --soft: #9aa3ae;
  --rule: #343a42; --c1: #7ab3f5; --c2: #f59a62; --c3: #5ecbb4; --c4: #d29be6; --good: #5ecbb4; --bad: #f28b82;
  --wash: #262b32; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 20px 20px 60px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0; }
.soft, figcaption p { color: var(--soft); font-size: 13px; }
.state { display: inline-block; padding: 1px 9px; border-radius: 99px; border: 1px solid currentColor; color: var(--c1);
  font-size: 13px; vertical-align: 3px; margin-left: 6px; white-space: nowrap; }
.state.finished { color: var(--good); }
.state.stopped { color: var(--bad); }
.bar { height: 6px; margin: 14px 0; border-radius: 3px; background: var(--wash); overflow: hidden; }
.bar span { display: block; height: 100%; background: var(--c1); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px; margin: 0; padding: 0;
  list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 9px 12px; }
.tiles span { display: block; color: var(--soft); font-size: 13px; }
.tiles b { font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 14px;
  margin-top: 14px; }
.chart { margin: 0; padding: 12px 14px 8px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  display: flex; flex-direction: column; min-width: 0; }
.chart svg { width: 100%; height: auto; margin-top: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 6px 0 4px; padding: 0; list-style: none;
  font-size: 13px; color: var(--soft); }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; vertical-align: 3px; margin-right: 5px;
  background: var(--c); }
.key.dots { width: 6px; height: 6px; border-radius: 3px; vertical-align: 1px; opacity: .55; }
.key.marks { width: 9px; height: 9px; border-radius: 5px; vertical-align: -1px; }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
svg text { fill: var(--soft); font-size: 11px; }
.grid, .axis { stroke: var(--rule); stroke-width: 1; fill: none; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: var(--c); opacity: .45; }
.mark { fill: var(--c); stroke: var(--card); stroke-width: 1.2; }
.band { fill: transparent; } .band:hover { fill: var(--ink); fill-opacity: .07; }
details { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; margin: 8px 0; }
summary { padding: 9px 14px; cursor: pointer; font-weight: 600; }
summary .soft { font-weight: 400; margin-left: 6px; }
details[open] > summary { border-bottom: 1px solid var(--rule); }
.sample { padding: 12px 14px; }
.sample + .sample { border-top: 1px solid var(--rule); }
.sample h3 { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; }
.sample h3 span { font-weight: 400; font-size: 13px; color: var(--soft); }
.sample h3 span b { color: var(--ink); }
pre { margin: 6px 0 0; padding: 9px 11px; border-radius: 6px; background: var(--wash); white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  unicode-bidi: plaintext; max-height: 26em; overflow-y: auto; }
pre.prompt { background: none; padding: 0; color: var(--soft); }
.servers { margin: 0; padding: 0; list-style: none; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
.servers li { display: flex; flex-wrap: wrap; gap: 0 18px; padding: 8px 14px; }
.servers li + li { border-top: 1px solid var(--rule); }
.servers b { font-weight: 600; overflow-wrap: anywhere; min-width: 0; }
.servers p { flex-basis: 100%; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.up { color: var(--good); } .down { color: var(--bad); }
.settings { columns: 2 420px; column-gap: 30px; padding: 10px 14px; margin: 0; font-size: 14px; }
.settings div { break-inside: avoid; padding: 3px 0; }
.settings dt { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.settings dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 480px) { main { padding: 14px 12px 40px; } h1 { font-size: 20px; } .chart { padding: 10px 10px 6px; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(100px, 1fr)); gap: 8px; } .tiles b { font-size: 17px; }
  .tiles li { padding: 7px 10px; } }
@media print { details { break-inside: avoid; } }
"""

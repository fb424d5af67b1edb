"""The denoising player: an HTML fragment that shows, step by step, how a completion came out of its masks.

`viewer_html(samples)` needs nothing else on the page: style, markup, data and script are in the fragment, under the
class prefix `d1v`. The address may name the state to open with: `#sample=2&step=3`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from d1jax.telemetry.markup import script_json


def viewer_html(samples: Sequence[Mapping[str, Any]]) -> str:
    """The player for these lines of `samples.jsonl`; lines without `pieces` and `reveal_step` are left out.

    Text only ever reaches the page through `textContent`, from a JSON element in which `<`, `>` and `&` are escaped.
    """
    payload = [one for one in map(viewer_payload, samples) if one is not None]
    if not payload:
        return '<p class="d1v-none">No denoising trajectories were recorded.</p>'
    return (
        f"<style>{_STYLE}</style>"
        f'<div class="d1v">{_MARKUP}'
        f'<script type="application/json" class="d1v-data">{script_json(payload)}</script></div>'
        f"<script>{_SCRIPT}</script>"
    )


def viewer_payload(sample: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the player needs of one sample, or None when the sample holds no usable trajectory.

    `steps` is the number of denoising steps that committed something: max(reveal_step) + 1.
    """
    pieces, reveal = sample.get("pieces"), sample.get("reveal_step")
    if not isinstance(pieces, list) or not isinstance(reveal, list) or len(pieces) != len(reveal) or not pieces:
        return None
    if not all(isinstance(step, int) for step in reveal):
        return None
    confidence = sample.get("confidence")
    if not isinstance(confidence, list) or len(confidence) != len(pieces):
        confidence = [None] * len(pieces)
    columns = sample.get("columns")
    grade = sample.get("grade")
    return {
        "stage": str(sample.get("stage", "")),
        "set": str(sample.get("set", "")),
        "index": sample.get("index") if isinstance(sample.get("index"), int) else None,
        "prompt": str(sample.get("prompt", "")),
        "pieces": [str(piece) for piece in pieces],
        "reveal": reveal,
        "confidence": [_unit(value) for value in confidence],
        "columns": columns if isinstance(columns, int) and 1 <= columns <= 64 else None,
        "solved": _unit(grade.get("solved")) if isinstance(grade, Mapping) else None,
        "steps": max(0, max(reveal)) + 1,
    }


def _unit(value: Any) -> float | None:
    """A number in [0, 1] to four digits, or None (JSON has no NaN)."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return round(min(1.0, max(0.0, float(value))), 4)


_MARKUP = """
<div class="d1v-bar">
<label class="d1v-pick"><span>Sample</span> <select class="d1v-sample"></select></label>
<span class="d1v-colour" role="group" aria-label="Colour the tokens by">
<span>Colour by</span><button type="button" data-by="confidence" aria-pressed="true">confidence</button
><button type="button" data-by="step" aria-pressed="false">step</button></span>
</div>
<div class="d1v-stage" tabindex="0" role="group"
 aria-label="Completion while it is denoised. Arrow keys step, space plays.">
<div class="d1v-part"><h4>Prompt</h4><div class="d1v-prompt"></div><p class="d1v-typed"></p></div>
<div class="d1v-part d1v-grow"><h4>Completion</h4><div class="d1v-out"></div><p class="d1v-after"></p></div>
</div>
<div class="d1v-controls">
<button type="button" class="d1v-play">Play</button>
<input class="d1v-slider" type="range" min="0" step="1" aria-label="Denoising step">
<output class="d1v-status" aria-live="polite"></output>
</div>
<div class="d1v-legend"><span class="d1v-key"><i class="d1v-swatch d1v-mask"></i>masked</span>
<span class="d1v-key"><i class="d1v-swatch d1v-now"></i>committed in this step</span>
<span class="d1v-key"><span class="d1v-low"></span><i class="d1v-ramp"></i><span class="d1v-high"></span></span>
<span class="d1v-keys">Keys: ← → step, space plays, Home and End jump</span></div>
<noscript>The player needs JavaScript.</noscript>
"""

_STYLE = """
.d1v{--d1v-ink:#1d2126;--d1v-soft:#5b6470;--d1v-edge:#d9d7d0;--d1v-ground:#fff;--d1v-mask:#e9e7e1;--d1v-hatch:#d6d3ca;
  --d1v-lo:#fbe3c8;--d1v-hi:#b9d8ef;--d1v-early:#dfeee2;--d1v-late:#d9c5ec;--d1v-ring:#1f4f8f;--d1v-good:#1f6f4a;
  --d1v-bad:#a4372b;color:var(--d1v-ink);background:var(--d1v-ground);border:1px solid var(--d1v-edge);
  border-radius:8px;padding:16px 18px;
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;break-inside:avoid}
@media screen and (prefers-color-scheme:dark){
  .d1v{--d1v-ink:#e6e6e3;--d1v-soft:#a2a9b3;--d1v-edge:#3a3f47;--d1v-ground:#1d2025;--d1v-mask:#2b2f36;
  --d1v-hatch:#3b4049;--d1v-lo:#6b4520;--d1v-hi:#1f4a6e;--d1v-early:#24482f;--d1v-late:#553277;--d1v-ring:#9cc4f2;
  --d1v-good:#7ccba2;--d1v-bad:#f09a8c}
}
.d1v *{box-sizing:border-box}
.d1v-bar,.d1v-controls,.d1v-legend{display:flex;flex-wrap:wrap;gap:8px 20px;align-items:center}
.d1v-bar{justify-content:space-between;margin-bottom:14px}
.d1v-pick{min-width:0;max-width:100%}
.d1v-pick span,.d1v-colour span{color:var(--d1v-soft);font-size:13px;margin-right:6px}
.d1v button,.d1v select{font:inherit;font-size:14px;color:inherit;background:var(--d1v-ground);
  border:1px solid var(--d1v-edge);border-radius:5px;padding:4px 10px;min-height:32px;max-width:100%}
.d1v button{cursor:pointer}
.d1v button[aria-pressed=true]{background:var(--d1v-ink);color:var(--d1v-ground);border-color:var(--d1v-ink)}
.d1v-colour button:first-of-type{border-radius:5px 0 0 5px}
.d1v-colour button:last-of-type{border-radius:0 5px 5px 0;border-left:0}
.d1v :focus-visible{outline:2px solid var(--d1v-ring);outline-offset:2px}
.d1v-stage{display:flex;flex-wrap:wrap;gap:16px 44px;padding:4px 0 14px;border-radius:4px}
.d1v-part{min-width:0;max-width:100%}
.d1v-text .d1v-part{flex:1 1 100%}
.d1v h4{margin:0 0 8px;font-size:13px;font-weight:500;color:var(--d1v-soft)}
.d1v-prompt,.d1v-out{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:14px;
  line-height:1.75;white-space:pre-wrap;overflow-wrap:anywhere}
.d1v-typed{margin:8px 0 0;font:12px/1.4 ui-monospace,Menlo,Consolas,monospace;color:var(--d1v-soft);overflow-wrap:anywhere;
  max-width:30ch}
.d1v-typed:empty{display:none}
.d1v-scroll{max-height:11em;overflow:auto}
.d1v-grid{display:grid;gap:2px;width:max-content;max-width:100%;line-height:1}
.d1v-grid .d1v-cell{min-width:0;width:38px;max-width:100%;aspect-ratio:1;display:grid;place-items:center;padding:0;
  margin:0;font-size:18px}
.d1v-few .d1v-cell{width:50px;font-size:22px}
.d1v-wide .d1v-cell{width:30px;font-size:15px}
.d1v-grid .d1v-long{font-size:10px;overflow:hidden}
.d1v-boxright{margin-right:4px!important}
.d1v-boxdown{margin-bottom:4px!important}
.d1v-cell{border-radius:3px;padding:1px 0;margin:0;box-shadow:inset 0 0 0 1px transparent}
.d1v-out:not(.d1v-grid) .d1v-cell{box-decoration-break:clone;-webkit-box-decoration-break:clone;
  border-left:1px solid var(--d1v-ground);border-right:1px solid var(--d1v-ground)}
.d1v-clue{background:transparent;box-shadow:inset 0 0 0 1px var(--d1v-edge)}
.d1v-given{font-weight:700}
.d1v-mask{background:repeating-linear-gradient(135deg,var(--d1v-mask) 0 4px,var(--d1v-hatch) 4px 5px)}
.d1v-now{box-shadow:inset 0 0 0 2px var(--d1v-ring)}
.d1v-out:not(.d1v-grid) .d1v-now{position:relative;box-shadow:0 0 0 1.5px var(--d1v-ring)}
.d1v-never{color:var(--d1v-soft);opacity:.6}
.d1v-sign{color:var(--d1v-soft)}
.d1v-after{margin:8px 0 0;color:var(--d1v-soft);font-size:13px}
.d1v-after:empty{display:none}
.d1v-slider{flex:1 1 160px;min-width:120px;accent-color:var(--d1v-ring);min-height:32px}
.d1v-status{font-variant-numeric:tabular-nums;min-width:17em}
.d1v-play{min-width:5em}
.d1v-legend{margin-top:10px;font-size:13px;color:var(--d1v-soft)}
.d1v-key{display:inline-flex;gap:6px;align-items:center}
.d1v-swatch{width:16px;height:16px;border-radius:3px}
.d1v-ramp{width:84px;height:12px;border-radius:3px}
@media (max-width:560px){
  .d1v{padding:12px}
  .d1v-keys{display:none}
  .d1v-status{flex:1 1 100%}
}
@media print{
  .d1v-controls button,.d1v-slider,.d1v-keys,.d1v-colour{display:none}
}
"""

_SCRIPT = r"""
(() => {
  const root = document.currentScript.previousElementSibling;
  const $ = (name) => root.querySelector('.d1v-' + name);
  const samples = JSON.parse($('data').textContent);
  const asked = new URLSearchParams(location.hash.slice(1));
  const state = {sample: 0, step: 0, by: 'confidence', timer: null};
  const toggles = root.querySelectorAll('[data-by]');
  let cells = [];

  const RAMP = {
    confidence: ['--d1v-lo', '--d1v-hi', 'unsure', 'sure'],
    step: ['--d1v-early', '--d1v-late', 'early', 'late'],
  };
  function shade(t) {
    const [lo, hi] = RAMP[state.by];
    return `color-mix(in srgb, var(${hi}) ${Math.round(100 * t)}%, var(${lo}))`;
  }
  const special = (piece) => /^<.+>$/.test(piece);
  const blankClue = (c) => c === '0' || c === '.' || c === '_';

  function cell(parent, text, title) {
    const one = document.createElement('span');
    one.className = 'd1v-cell';
    one.textContent = text;
    if (title) one.title = title;
    parent.append(one);
    return one;
  }
  function layout(box, columns) {
    box.replaceChildren();
    box.className = box.className.split(' ')[0];
    if (!columns) return;
    box.classList.add('d1v-grid');
    box.classList.toggle('d1v-few', columns <= 5);
    box.classList.toggle('d1v-wide', columns > 6);
    box.style.gridTemplateColumns = `repeat(${columns}, auto)`;
  }
  // Sudoku boxes: a square grid whose side is a square number gets a wider gap between boxes.
  function boxes(one, i, columns, count) {
    const side = Math.sqrt(columns);
    if (!Number.isInteger(side) || side < 2 || count !== columns * columns) return;
    const row = Math.floor(i / columns), column = i % columns;
    one.classList.toggle('d1v-boxright', column % side === side - 1 && column < columns - 1);
    one.classList.toggle('d1v-boxdown', row % side === side - 1 && row < columns - 1);
  }
  function load(number) {
    const s = samples[state.sample = number];
    const n = s.pieces.length, prompt = $('prompt'), out = $('out');
    const chars = Array.from(s.columns ? s.prompt.replace(/\n/g, '') : s.prompt);
    const promptGrid = s.columns && chars.length > 0 && chars.length % s.columns === 0;
    // Line breaks belong to the prompt, and a grid does not show them.
    $('typed').textContent = promptGrid && s.prompt.includes('\n') ? JSON.stringify(s.prompt) : '';
    $('stage').classList.toggle('d1v-text', !s.columns);
    layout(prompt, promptGrid ? s.columns : null);
    if (promptGrid) chars.forEach((c, i) => {
      const one = cell(prompt, blankClue(c) ? '' : c);
      one.classList.add('d1v-clue', 'd1v-given');
      boxes(one, i, s.columns, chars.length);
    });
    else { prompt.textContent = s.prompt; prompt.classList.add('d1v-scroll'); }
    layout(out, s.columns);
    cells = [];
    const last = s.reveal.findLastIndex((r) => r >= 0);
    s.pieces.forEach((piece, i) => {
      if (!s.columns && i > last) { cells.push(null); return; }  // the tail that was never decoded is only counted
      const sure = s.confidence[i] === null ? '' : `, confidence ${s.confidence[i].toFixed(2)}`;
      const one = cell(out, '', s.reveal[i] < 0 ? `position ${i + 1}: after the end, never decoded`
                                                : `position ${i + 1}: step ${s.reveal[i] + 1}${sure}`);
      if (s.columns) boxes(one, i, s.columns, n);
      if (promptGrid && chars.length === n && !blankClue(chars[i])) one.classList.add('d1v-given');
      if (!s.columns && s.reveal[i] >= 0 && /\n/.test(piece)) out.append('\n');
      cells.push(one);
    });
    const never = s.reveal.filter((r) => r < 0).length;
    const were = never === 1 ? 'position after the end was' : 'positions after the end were';
    $('after').textContent = never && !s.columns ? `${never} ${were} never decoded.` : '';
    $('slider').max = s.steps;
  }
  function draw() {
    const s = samples[state.sample];
    let done = 0, total = 0;
    s.pieces.forEach((piece, i) => {
      const at = s.reveal[i], one = cells[i];
      if (at >= 0) { total += 1; if (at < state.step) done += 1; }
      if (!one) return;
      const never = at < 0, shown = !never && at < state.step;
      const text = piece.replace(/\n/g, '↵') || '∅';
      one.classList.toggle('d1v-mask', !never && !shown);
      one.classList.toggle('d1v-now', shown && at === state.step - 1);
      one.classList.toggle('d1v-never', never);
      one.classList.toggle('d1v-sign', shown && (special(piece) || /^\n+$/.test(piece)));
      one.classList.toggle('d1v-long', Array.from(text).length > 2);
      // A mask keeps the width of its token, so that the text does not jump when it is revealed.
      const blank = s.columns ? '' : Array.from(text, (c) => (c === ' ' ? ' ' : '\u00a0')).join('');
      one.textContent = never ? '·' : shown ? text : blank;
      const c = s.confidence[i];
      const t = state.by === 'step' ? (s.steps > 1 ? at / (s.steps - 1) : 1) : c;
      one.style.background = shown && t !== null ? shade(t) : '';
    });
    $('slider').value = state.step;
    const word = s.solved === null || state.step < s.steps ? '' : s.solved >= 1 ? ' (solved)' : ' (not solved)';
    $('status').textContent = `step ${state.step} of ${s.steps}: ${done} of ${total} tokens committed${word}`;
    $('slider').setAttribute('aria-valuetext', $('status').textContent);
    const [lo, hi, low, high] = RAMP[state.by];
    $('ramp').style.background = `linear-gradient(90deg, var(${lo}), var(${hi}))`;
    $('low').textContent = low;
    $('high').textContent = high;
    for (const b of toggles) b.setAttribute('aria-pressed', String(b.dataset.by === state.by));
    root.dataset.step = state.step;
  }
  function go(step) { state.step = Math.max(0, Math.min(samples[state.sample].steps, step)); draw(); }
  function stop() { clearInterval(state.timer); state.timer = null; $('play').textContent = 'Play'; }
  function play() {
    if (state.timer) return stop();
    const steps = samples[state.sample].steps;
    if (state.step >= steps) go(0);
    $('play').textContent = 'Pause';
    const pause = steps > 40 ? 120 : steps > 16 ? 250 : 600;
    state.timer = setInterval(() => { go(state.step + 1); if (state.step >= steps) stop(); }, pause);
  }

  samples.forEach((s, i) => {
    const mark = s.solved === null ? '' : s.solved >= 1 ? ', solved' : ', not solved';
    const set = s.set === 'held_out' ? 'held-out' : s.set.replace(/_/g, ' ');
    const named = `${set} ${s.index === null ? i : s.index}`.trim();
    $('sample').add(new Option([s.stage.toUpperCase(), named].filter(Boolean).join(', ') + mark, i));
  });
  const middle = () => Math.ceil(samples[state.sample].steps / 2);
  $('sample').addEventListener('change', (e) => { stop(); load(Number(e.target.value)); go(middle()); });
  $('slider').addEventListener('input', (e) => { stop(); go(Number(e.target.value)); });
  $('play').addEventListener('click', play);
  for (const b of toggles) b.addEventListener('click', () => { state.by = b.dataset.by; draw(); });
  root.addEventListener('keydown', (e) => {
    if (e.target.tagName === 'SELECT' || e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === ' ' && e.target.tagName === 'BUTTON') return;
    const moves = {ArrowLeft: state.step - 1, ArrowRight: state.step + 1, Home: 0, End: samples[state.sample].steps};
    if (e.key in moves) { stop(); go(moves[e.key]); } else if (e.key === ' ') play(); else return;
    e.preventDefault();
  });

  const first = Number(asked.get('sample') ?? 0);
  load(Number.isInteger(first) && first >= 0 && first < samples.length ? first : 0);
  $('sample').value = state.sample;
  if (asked.get('colour') === 'step') state.by = 'step';
  const step = asked.has('step') ? Number(asked.get('step')) : middle();
  go(Number.isFinite(step) ? step : 0);
})();
"""

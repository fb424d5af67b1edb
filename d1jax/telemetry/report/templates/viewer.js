// The denoising player: arrow keys step, space plays. Text only ever reaches the page through `textContent`.
(() => {
  const root = document.querySelector('.viewer');
  if (!root) return;
  const $ = (name) => root.querySelector('.viewer-' + name);
  const samples = JSON.parse($('data').textContent);
  const asked = new URLSearchParams(location.hash.slice(1));
  const state = {sample: 0, step: 0, by: 'confidence', timer: null};
  const toggles = root.querySelectorAll('[data-by]');
  let cells = [];

  const RAMP = {
    confidence: ['--unsure', '--sure', 'unsure', 'sure'],
    step: ['--early', '--late', 'early', 'late'],
  };
  function shade(t) {
    const [lo, hi] = RAMP[state.by];
    return `color-mix(in srgb, var(${hi}) ${Math.round(100 * t)}%, var(${lo}))`;
  }
  const special = (piece) => /^<.+>$/.test(piece);
  const blankClue = (c) => c === '0' || c === '.' || c === '_';

  function cell(parent, text, title) {
    const one = document.createElement('span');
    one.className = 'viewer-cell';
    one.textContent = text;
    if (title) one.title = title;
    parent.append(one);
    return one;
  }
  function layout(box, columns) {
    box.replaceChildren();
    box.className = box.className.split(' ')[0];
    if (!columns) return;
    box.classList.add('viewer-grid');
    box.classList.toggle('viewer-few', columns <= 5);
    box.classList.toggle('viewer-wide', columns > 6);
    box.style.gridTemplateColumns = `repeat(${columns}, auto)`;
  }
  // Sudoku boxes: a square grid whose side is a square number gets a wider gap between boxes.
  function boxes(one, i, columns, count) {
    const side = Math.sqrt(columns);
    if (!Number.isInteger(side) || side < 2 || count !== columns * columns) return;
    const row = Math.floor(i / columns), column = i % columns;
    one.classList.toggle('viewer-boxright', column % side === side - 1 && column < columns - 1);
    one.classList.toggle('viewer-boxdown', row % side === side - 1 && row < columns - 1);
  }
  function load(number) {
    const s = samples[state.sample = number];
    const n = s.pieces.length, prompt = $('prompt'), out = $('out');
    const chars = Array.from(s.columns ? s.prompt.replace(/\n/g, '') : s.prompt);
    const promptGrid = s.columns && chars.length > 0 && chars.length % s.columns === 0;
    // Line breaks belong to the prompt, and a grid does not show them.
    $('typed').textContent = promptGrid && s.prompt.includes('\n') ? JSON.stringify(s.prompt) : '';
    $('stage').classList.toggle('viewer-text', !s.columns);
    layout(prompt, promptGrid ? s.columns : null);
    if (promptGrid) chars.forEach((c, i) => {
      const one = cell(prompt, blankClue(c) ? '' : c);
      one.classList.add('viewer-clue', 'viewer-given');
      boxes(one, i, s.columns, chars.length);
    });
    else { prompt.textContent = s.prompt; prompt.classList.add('viewer-scroll'); }
    layout(out, s.columns);
    cells = [];
    const last = s.reveal.findLastIndex((r) => r >= 0);
    s.pieces.forEach((piece, i) => {
      if (!s.columns && i > last) { cells.push(null); return; }  // the tail that was never decoded is only counted
      const sure = s.confidence[i] === null ? '' : `, confidence ${s.confidence[i].toFixed(2)}`;
      const one = cell(out, '', s.reveal[i] < 0 ? `position ${i + 1}: after the end, never decoded`
                                                : `position ${i + 1}: step ${s.reveal[i] + 1}${sure}`);
      if (s.columns) boxes(one, i, s.columns, n);
      if (promptGrid && chars.length === n && !blankClue(chars[i])) one.classList.add('viewer-given');
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
      one.classList.toggle('viewer-mask', !never && !shown);
      one.classList.toggle('viewer-now', shown && at === state.step - 1);
      one.classList.toggle('viewer-never', never);
      one.classList.toggle('viewer-sign', shown && (special(piece) || /^\n+$/.test(piece)));
      one.classList.toggle('viewer-long', Array.from(text).length > 2);
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
    const named = `${s.set} ${s.index === null ? i : s.index}`.trim();
    $('sample').add(new Option([s.stage, named].filter(Boolean).join(', ') + mark, i));
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

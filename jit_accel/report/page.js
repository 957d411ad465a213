"use strict";
// Lets the reader smooth, rescale, hide runs, find settings and leaf through samples.
(() => {
  const { page, state, isComparison, SMOOTHING, drawAll, redraw } = report;
  const one = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];

  // --- controls

  function connectToolbar() {
    const slider = one("#smoothing");
    slider.value = state.smoothing;
    const say = () => {
      const share = SMOOTHING[state.smoothing];
      one("#smoothing-share").textContent = share ? `${+(share * 100).toFixed(1)} % of the run` : "none";
    };
    slider.addEventListener("input", () => { state.smoothing = Number(slider.value); say(); redraw(); });
    say();
    all("input[name=y], input[name=x]").forEach((radio) => radio.addEventListener("change", () => {
      state[radio.name] = radio.value;
      state.range = null;
      redraw();
    }));
    one("#raw").addEventListener("change", (event) => { state.raw = event.target.checked; redraw(); });
    all("input[data-run]").forEach((box) => box.addEventListener("change", () => {
      const run = Number(box.dataset.run);
      if (box.checked) state.hidden.delete(run); else state.hidden.add(run);
      redraw();
      showSheets();
    }));
    if (!page.charts.length) one(".toolbar").remove();
  }

  function connectBins() {
    const chart = page.charts.find((other) => other.id === "loss_by_t");
    if (!chart || !isComparison) return;
    const names = [...new Set(chart.series.map((series) => series.name))].sort();
    state.bin = names[Math.floor(names.length / 2)];
    const select = document.createElement("select");
    names.forEach((name) => select.add(new Option(`t ${name}`, name, name === state.bin, name === state.bin)));
    select.setAttribute("aria-label", "Bin of t");
    select.addEventListener("change", () => { state.bin = select.value; redraw(); });
    one('[data-chart="loss_by_t"] .options').append(select);
  }

  function connectSearch() {
    const search = one("#search");
    if (!search) return;
    const isOpen = new Map(all(".settings details").map((group) => [group, group.open]));
    search.addEventListener("input", () => {
      const wanted = search.value.trim().toLowerCase();
      isOpen.forEach((wasOpen, group) => {
        const rows = [...group.querySelectorAll("tbody tr")];
        rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
        const found = rows.some((row) => !row.hidden);
        group.hidden = !found;
        group.open = wanted ? found : wasOpen;
      });
    });
  }

  // --- samples

  const sheetSteps = [...new Set(page.sheets.flatMap((of) => of.sheets.map((sheet) => sheet.step)))].sort((a, b) => a - b);
  let position = sheetSteps.length - 1;

  // Twice where it has names, which are black: the one with the names alone is light on a dark page.
  function framed(sheet, label) {
    const frame = document.createElement("div");
    frame.className = "sheet";
    frame.style.setProperty("--names", `${100 * sheet.names}%`);
    for (const part of sheet.names ? ["images", "names"] : ["images"]) {
      const image = new Image(sheet.width, sheet.height);
      image.src = sheet.src;
      image.className = part;
      image.alt = part === "images" ? `Samples of ${label} at step ${sheet.step}` : "";
      frame.append(image);
    }
    return frame;
  }

  function showSheets() {
    const place = one("#sheets");
    if (!place) return;
    const step = sheetSteps[position];
    one("#sheet").value = position;
    one("#sheet-step").textContent = `step ${step.toLocaleString("en")} (${position + 1} of ${sheetSteps.length})`;
    one("#sheet").setAttribute("aria-valuetext", `step ${step}`);
    one("#sheet-before").disabled = position === 0;
    one("#sheet-after").disabled = position === sheetSteps.length - 1;
    place.classList.toggle("several", isComparison);
    place.replaceChildren(...page.sheets.filter((of) => !state.hidden.has(of.run)).map((of) => {
      const sheet = of.sheets.filter((other) => other.step <= step).pop();
      const label = page.runs[of.run].label;
      const figure = document.createElement("figure");
      if (isComparison) {
        const caption = document.createElement("figcaption");
        caption.textContent = sheet ? `${label} · step ${sheet.step.toLocaleString("en")}` : `${label} · none yet`;
        figure.append(caption);
      }
      if (sheet) figure.append(framed(sheet, label));
      return figure;
    }));
  }

  function moveTo(wanted) {
    position = Math.min(Math.max(wanted, 0), sheetSteps.length - 1);
    showSheets();
  }

  function followHash(isScrolling) {
    const match = /^#sheet=(\d+)$/.exec(location.hash);
    if (!match) return;
    moveTo(Number(match[1]));
    if (isScrolling) one("#samples-title").scrollIntoView();
  }

  function connectSheets() {
    if (!sheetSteps.length) return;
    one("#sheet").max = sheetSteps.length - 1;
    one("#sheet").addEventListener("input", (event) => moveTo(Number(event.target.value)));
    one("#sheet-before").addEventListener("click", () => moveTo(position - 1));
    one("#sheet-after").addEventListener("click", () => moveTo(position + 1));
    addEventListener("keydown", (event) => {
      const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.target.closest?.(".scrolled");
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by || isTyping || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
      moveTo(position + by);
    });
    addEventListener("hashchange", () => followHash(true));
    showSheets();
    followHash(false);
  }

  connectToolbar();
  connectBins();
  connectSearch();
  connectSheets();
  drawAll();
  document.documentElement.dataset.ready = "true";
})();

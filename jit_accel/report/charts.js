"use strict";
// Draws the charts; charts.py says what is in them. Colours come from page.css, so that they follow the reader's scheme.
const report = (() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const isComparison = page.runs.length > 1;
  const SMOOTHING = [0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1]; // share of the run that the running mean remembers
  const BINS = {
    light: ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#a0bd1a", "#d3ac00"],
    dark: ["#8d7ff5", "#6f92ec", "#57a8de", "#45b8d0", "#3ac6b8", "#46d19b", "#6bda7a", "#9be25a", "#c8e64a", "#fde75a"],
  };
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const SYMBOLS = ["circle", "diamond", "square", "cross", "star"];
  const MOST_MARKERS = 60;
  const state = {
    smoothing: Math.max(0, SMOOTHING.indexOf(page.smoothing)), y: "log", x: "linear", raw: true,
    hidden: new Set(), bin: null, range: null,
  };
  const isDark = matchMedia("screen and (prefers-color-scheme: dark)");
  const isNarrow = matchMedia("(max-width: 800px)");
  const isCoarse = matchMedia("(pointer: coarse)");
  const one = (selector) => document.querySelector(selector);

  // --- numbers

  // Running mean with a memory in steps, at most a tenth of the steps so far, so that it follows the steep start, and
  // without bias there. A point counts as often as it has values. `Curve.smoothed_end` in curves.py is its last value.
  function smooth(series, memory) {
    let total = 0, weight = 0, before = null;
    return series.x.map((x, i) => {
      const y = series.y[i];
      if (y === null) return null;
      const kept = before !== null && memory > 0 ? Math.exp((before - x) / Math.min(memory, x / 10)) : 0;
      const n = series.n ? series.n[i] : 1;
      total = total * kept + y * n;
      weight = weight * kept + n;
      before = x;
      return total / weight;
    });
  }

  function nearest(values, x) { // index in ascending values
    let low = 0, high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] <= x) low = middle; else high = middle;
    }
    return Math.abs(values[high] - x) < Math.abs(values[low] - x) ? high : low;
  }

  function highestNear(points, i) {
    return Math.max(...points.slice(Math.max(0, i - 1), i + 2).map(([, y]) => y));
  }

  function epochAt(run, step) {
    const epochs = page.runs[run].epochs;
    if (!epochs) return null;
    const { x, y } = epochs;
    if (x.length < 2) return y[0];
    const near = nearest(x, step);
    const i = Math.min(Math.max(x[near] < step ? near + 1 : near, 1), x.length - 1);
    return y[i - 1] + ((step - x[i - 1]) / (x[i] - x[i - 1])) * (y[i] - y[i - 1]);
  }

  // --- words and colours

  // Plotly reads tags in names; what a run is called is text.
  const text = (name) => {
    const short = name.length > 44 ? `${name.slice(0, 20)}…${name.slice(-22)}` : name;
    return short.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const seriesColour = (i) => css(`series-${i % 8}`);
  const binColours = () => (isDark.matches ? BINS.dark : BINS.light);
  const binColour = (t) => binColours()[Math.min(9, Math.floor(t * 10))];
  const faint = (colour, opacity) => colour + Math.round(opacity * 255).toString(16).padStart(2, "0");

  // --- charts

  function look(chart, series) {
    const names = [...new Set(chart.series.map((other) => other.name))];
    const kind = names.indexOf(series.name);
    const symbol = SYMBOLS[kind % 5];
    if (isComparison) { // lines are solid, and kinds told apart by their symbols, unless there are more runs than colours
      return { colour: seriesColour(series.run), dash: DASHES[Math.floor(series.run / 8) % 5], symbol, isMarked: kind > 0 };
    }
    const colour = series.style === "bin" ? binColour(series.t) : seriesColour(kind);
    return { colour, dash: "solid", symbol, isMarked: false };
  }

  const isLog = (chart) => chart.scale === "log" && state.y === "log"
    && chart.series.some((series) => series.y.some((y) => y > 0));
  // A logarithmic axis has no place for 0, to which plotly would draw a line.
  const onAxis = (chart, values) => (isLog(chart) ? values.map((y) => (y > 0 ? y : null)) : values);

  function tracesOf(chart, series) {
    const { colour, dash, symbol, isMarked: hasSymbols } = look(chart, series);
    const visible = visibility(chart, series);
    const legendgroup = isComparison ? series.name : undefined;
    const name = isComparison ? text(page.runs[series.run].label) : text(series.name);
    const isSmoothed = series.style === "smooth" || series.style === "bin";
    const isMarked = series.style === "points" && series.x.length <= MOST_MARKERS;
    const memory = SMOOTHING[state.smoothing] * page.runs[series.run].steps;
    const y = onAxis(chart, isSmoothed ? smooth(series, memory) : series.y);
    const isAt = (i) => (y[i] ?? null) !== null;
    // A point without neighbours would be a line of no length.
    const isAlone = series.x.map((_, i) => isAt(i) && !isAt(i - 1) && !isAt(i + 1));
    const traces = [];
    if (series.raw && state.raw) {
      traces.push({
        x: series.raw.x, y: onAxis(chart, series.raw.y), name: `${name}, raw`, mode: "lines", visible, legendgroup, showlegend: false,
        line: { color: faint(colour, isComparison ? 0.2 : 0.32), width: 1 },
        hoverinfo: "skip",
      });
    }
    const epochs = series.x.map((step) => epochAt(series.run, step));
    const isFirst = !chart.series.slice(0, chart.series.indexOf(series)).some((other) => other.run === series.run);
    traces.push({
      x: series.x, y, name, visible, legendgroup, showlegend: !isComparison,
      mode: isMarked || hasSymbols || isAlone.includes(true) ? "lines+markers" : "lines",
      line: { color: colour, width: series.style === "bin" ? 1.6 : 2.2, dash },
      marker: {
        color: colour, symbol, size: isMarked || hasSymbols ? 7 : isAlone.map((alone) => alone ? 7 : 0),
        maxdisplayed: hasSymbols && !isMarked ? 10 : 0,
      },
      customdata: epochs,
      hovertemplate: isFirst && epochs[0] !== null
        ? "%{y:.4~g}  (epoch %{customdata:.2f})" : "%{y:.4~g}",
    });
    return traces;
  }

  // Of several runs the means of the epochs would hide the curves they are the means of, until they are asked for.
  function visibility(chart, series) {
    if (state.hidden.has(series.run)) return false;
    return isComparison && chart.id === "loss" && series.name === "train, epoch" ? "legendonly" : true;
  }

  function profileTrace(series) {
    const colour = isComparison ? seriesColour(series.run) : css("soft");
    return {
      x: series.x, y: series.y, name: text(page.runs[series.run].label), visible: !state.hidden.has(series.run),
      customdata: series.bins, showlegend: false, mode: "lines+markers", line: { color: colour, width: isComparison ? 2.2 : 1.5 },
      marker: isComparison ? { color: colour, size: 7 } : { color: series.x.map(binColour), size: 13 },
      hovertemplate: `t %{customdata}: %{y:.4~g}${isComparison ? "" : "<extra></extra>"}`,
    };
  }

  function thresholdTraces(chart) {
    const steps = chart.series.flatMap((series) => [series.x[0], series.x[series.x.length - 1]]);
    return (chart.thresholds || []).filter((threshold) => threshold.is_drawn).map((threshold) => ({
      x: [Math.min(...steps), Math.max(...steps)], y: [threshold.value, threshold.value], mode: "lines",
      name: `${threshold.name} ${threshold.value}${chart.unit}`, hoverinfo: "skip", line: { color: css("event"), width: 1.2, dash: "dash" },
    }));
  }

  function eventTraces(chart) {
    return (chart.events || []).flatMap((event) => {
      const series = chart.series.find((other) => other.run === event.run);
      const curve = series && (series.raw || series);
      if (!curve) return [];
      const known = curve.x.map((x, i) => [x, curve.y[i]]).filter(([, y]) => y !== null);
      const steps = known.map(([x]) => x);
      return [{
        x: event.x, y: event.x.map((x) => highestNear(known, nearest(steps, x))), mode: "markers", name: text(event.name),
        visible: !state.hidden.has(event.run), showlegend: !isComparison, hovertemplate: `${text(event.name)}<extra></extra>`,
        marker: { symbol: "triangle-down", size: 11, color: css("event"), line: { color: css("card"), width: 1 } },
      }];
    });
  }

  // In a comparison colours stand for runs, so that the legend explains the lines' symbols in grey.
  function patternTraces(chart) {
    const names = [...new Set(chart.series.map((series) => series.name))];
    if (!isComparison || names.length < 2 || chart.series[0].style === "bin") return [];
    return names.map((name) => {
      const series = chart.series.find((other) => other.name === name);
      const { dash, symbol, isMarked } = look(chart, { ...series, run: 0 });
      return {
        x: [null], y: [null], name: text(name), legendgroup: name, visible: visibility(chart, { name, run: -1 }), mode: series.style === "points" || isMarked ? "lines+markers" : "lines",
        line: { color: css("soft"), dash, width: 2 }, marker: { color: css("soft"), symbol, size: 7 }, hoverinfo: "skip",
      };
    });
  }

  function shownSeries(chart) {
    if (chart.id !== "loss_by_t" || !isComparison) return chart.series;
    return chart.series.filter((series) => series.name === state.bin);
  }

  function build(chart) {
    if (chart.id === "profile") return chart.series.map(profileTrace);
    const shown = { ...chart, series: shownSeries(chart) };
    return [
      ...shown.series.flatMap((series) => tracesOf(shown, series)),
      ...thresholdTraces(shown), ...eventTraces(shown), ...patternTraces(shown),
    ];
  }

  // Digits between the powers of ten only where they have room.
  function logTicks(series) {
    const values = series.flatMap((one) => [...one.y, ...(one.raw && state.raw ? one.raw.y : [])]).filter((y) => y > 0);
    const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    const decades = Math.log10(high / low);
    return {
      dtick: decades > 0 && decades < 0.7 ? undefined : decades < 3.5 ? "D2" : Math.ceil(decades / 8),
      tickformat: low < 1e-3 || high > 1e6 ? ".0e" : "~r",
    };
  }

  function axesOf(chart) {
    const axis = {
      gridcolor: css("grid"), linecolor: css("line"), zerolinecolor: css("line"), tickcolor: css("line"),
      automargin: true, ticks: "outside", ticklen: 4,
    };
    const xaxis = chart.id === "profile"
      ? { ...axis, range: [0, 1], dtick: 0.2, title: { text: "t (0 noise, 1 image)", standoff: 8 }, fixedrange: true }
      : {
        ...axis, type: state.x, title: { text: "optimizer step", standoff: 8 }, hoverformat: ",.0f",
        unifiedhovertitle: { text: "step %{x:,.0f}" },
        ...(state.range ? { range: state.range } : { autorange: true }),
        ...(state.x === "log" ? { dtick: 1 } : { nticks: isNarrow.matches ? 5 : 8 }),
      };
    const yaxis = { ...axis, ...(isLog(chart) ? { type: "log", ...logTicks(chart.series) } : { rangemode: "tozero", nticks: 7 }) };
    return { xaxis, yaxis };
  }

  function layoutOf(chart, traces) {
    return {
      ...axesOf(chart),
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("soft") },
      margin: { l: 48, r: 12, t: 12, b: 40 },
      hovermode: chart.id === "profile" ? "closest" : "x unified",
      hoverlabel: { bgcolor: css("card"), bordercolor: css("line"), font: { color: css("ink"), size: 12 } },
      // A finger that drags wants to scroll the page.
      dragmode: isCoarse.matches ? false : "zoom",
      showlegend: traces.filter((trace) => trace.showlegend !== false).length > 1,
      legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", font: { color: css("ink"), size: 11.5 } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("soft"), activecolor: css("ink") },
      uirevision: `${state.x} ${state.y} ${state.bin}`,
    };
  }

  // Of plotly's buttons only these two: others, such as the one that uploads a chart, have no place here.
  const CONFIG = {
    responsive: true, displaylogo: false, showTips: false, plotlyServerURL: "", showSendToCloud: false,
    modeBarButtons: [["toImage", "resetScale2d"]], toImageButtonOptions: { scale: 2 },
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  };

  function draw(chart) {
    const place = one(`[data-chart="${chart.id}"] .plot`);
    const traces = build(chart);
    const isNew = !place.data;
    Plotly.react(place, traces, layoutOf(chart, traces), CONFIG);
    if (isNew && chart.id !== "profile") place.on("plotly_relayout", (change) => followZoom(chart, change));
  }

  // All charts over the steps show the same steps.
  let isFollowing = false;
  function followZoom(chart, change) {
    if (isFollowing) return;
    const isReset = "xaxis.autorange" in change;
    if (!isReset && !("xaxis.range[0]" in change)) return;
    state.range = isReset ? null : [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    isFollowing = true;
    const others = page.charts.filter((other) => other !== chart && other.id !== "profile");
    Promise.all(others.map((other) => Plotly.relayout(
      one(`[data-chart="${other.id}"] .plot`),
      isReset ? { "xaxis.autorange": true } : { "xaxis.range": [...state.range] },
    ))).finally(() => { isFollowing = false; });
  }

  let isScheduled = false;
  function drawAll() {
    document.querySelectorAll(".swatch").forEach((swatch) => { swatch.style.background = seriesColour(Number(swatch.dataset.run)); });
    page.charts.forEach(draw);
    document.documentElement.dataset.charts = page.charts.length;
  }
  function redraw() {
    if (isScheduled) return;
    isScheduled = true;
    requestAnimationFrame(() => { isScheduled = false; drawAll(); });
  }

  for (const query of [isDark, isNarrow, matchMedia("print")]) query.addEventListener("change", redraw);
  return { page, state, isComparison, SMOOTHING, drawAll, redraw };
})();

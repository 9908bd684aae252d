"use strict";
// Metrics of a node as charts, one per metric, from the API; drawn again while the node runs, and
// once more when it has ended.
(() => {
  const place = document.querySelector("[data-charts]");
  if (!place || typeof Plotly === "undefined") return;
  const EVERY = 10;
  const charts = new Map();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const layout = (name) => ({
    title: { text: name, font: { size: 13 }, x: 0.02, xanchor: "left" },
    margin: { l: 48, r: 10, t: 34, b: 34 },
    height: 240,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { size: 11, color: colour("--soft"), family: getComputedStyle(document.body).fontFamily },
    xaxis: { gridcolor: colour("--grid"), zeroline: false, title: { text: "step", standoff: 4 } },
    yaxis: { gridcolor: colour("--grid"), zeroline: false, automargin: true },
    showlegend: false,
    hovermode: "x",
  });
  const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false };

  const draw = (content) => {
    for (const name of content.available) {
      const rows = content.rows.filter((row) => typeof row[name] === "number");
      if (!rows.length) continue;
      let chart = charts.get(name);
      if (!chart) {
        chart = document.createElement("div");
        chart.className = "chart";
        place.append(chart);
        charts.set(name, chart);
      }
      const trace = {
        x: rows.map((row) => row.step),
        y: rows.map((row) => row[name]),
        type: "scatter",
        mode: rows.length > 60 ? "lines" : "lines+markers",
        line: { color: colour("--c1"), width: 1.8 },
        marker: { size: 5, color: colour("--c1") },
        hovertemplate: "%{y:.4g}<extra></extra>",
      };
      Plotly.react(chart, [trace], layout(name), CONFIG);
    }
  };
  let content = null;
  const load = async () => {
    try {
      content = await rlhf.api(`${place.dataset.charts}&points=400`);
      draw(content);
    } catch (error) {
      rlhf.trouble(error.message);
    }
  };
  dark.addEventListener("change", () => { if (content) draw(content); });
  const stateNow = () => document.querySelector("[data-state]")?.dataset.state;
  let before = stateNow();
  const loop = async () => {
    const state = stateNow();
    if (!document.hidden && (state === "running" || state !== before)) {
      await load();
      before = state;
    }
    setTimeout(loop, EVERY * 1000);
  };
  load();
  setTimeout(loop, EVERY * 1000);
})();

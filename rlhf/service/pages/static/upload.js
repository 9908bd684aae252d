"use strict";
// A file goes to the API as it is, in one stream; what the API says is shown as it is.
(() => {
  const form = document.getElementById("upload-form");
  if (!form) return;
  const field = (name) => document.getElementById(`upload-${name}`);
  const progress = field("progress");
  const result = field("result");
  const button = form.querySelector("button");
  let key = null;
  let sent = "";

  const say = (text, level, rows = [], link = null) => {
    const box = document.createElement("p");
    box.className = `message ${level}`;
    box.textContent = text;
    if (link) {
      const to = document.createElement("a");
      to.href = link;
      to.textContent = "Its page";
      box.append(" ", to);
    }
    const list = document.createElement("ul");
    for (const row of rows) {
      const item = document.createElement("li");
      item.textContent = `line ${row.line}: ${row.reason}`;
      list.append(item);
    }
    result.replaceChildren(box, ...(rows.length ? [list] : []));
  };
  // Names become folders, so they have letters, digits, dots, dashes and underscores only.
  field("file").addEventListener("change", () => {
    const name = field("file").files[0]?.name ?? "";
    field("name").value = name.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").replace(/-+\./g, ".");
  });
  const parse = (text) => {
    try { return JSON.parse(text); } catch { return {}; }
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (button.getAttribute("aria-disabled") === "true") return;
    const file = field("file").files[0];
    const stream = field("stream").value.trim();
    if (!file || !stream) {
      say(file ? "Name the stream that it belongs to." : "Choose a file first.", "stop");
      (file ? field("stream") : field("file")).focus();
      return;
    }
    if (file.size > Number(form.dataset.maxMb) * 2 ** 20) {
      say(`The file is larger than ${form.dataset.maxMb} MiB (service.max_upload_mb): use rlhf ingest.`, "stop");
      return;
    }
    const query = new URLSearchParams({ name: field("name").value.trim() || file.name, on_bad_row: field("policy").value });
    if (field("kind").value) query.set("kind", field("kind").value);
    const target = `/api/v1/streams/${encodeURIComponent(stream)}/batches?${query}`;
    // The same file sent again after a broken connection is the same request.
    const what = `${target} ${file.size} ${file.lastModified}`;
    if (what !== sent || key === null) key = `${Date.now()}-${Math.random().toString(36).slice(2)}`;
    sent = what;
    const request = new XMLHttpRequest();
    request.open("POST", target);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.setRequestHeader("Accept", "application/json");
    request.setRequestHeader("Idempotency-Key", key);
    const csrf = document.querySelector("meta[name=csrf]")?.content;
    if (csrf) request.setRequestHeader("X-CSRF-Token", csrf);
    request.upload.addEventListener("progress", (step) => {
      if (step.lengthComputable) progress.value = step.loaded / step.total;
    });
    const end = () => {
      button.removeAttribute("aria-disabled");
      progress.hidden = true;
    };
    request.addEventListener("load", () => {
      end();
      key = null;
      const answer = parse(request.responseText);
      if (request.status >= 200 && request.status < 300) {
        const link = answer.id ? `/batches/${encodeURIComponent(stream)}/${encodeURIComponent(answer.id)}` : null;
        const longer = (answer.extended ?? []).map(
          (item) => `run ${item.run} has new rounds: ${item.rounds.join(", ")}`,
        );
        say([answer.message, answer.drift, ...longer].filter(Boolean).join("\n"), "ok", [], link);
      } else {
        const rows = (answer.detail ?? "").includes("\n") ? [] : answer.refused ?? [];
        say(answer.detail ?? `The service answered ${request.status}.`, "stop", rows);
      }
    });
    request.addEventListener("error", () => {
      end();
      say("The connection broke: send it again, nothing is added twice.", "stop");
    });
    button.setAttribute("aria-disabled", "true");
    progress.value = 0;
    progress.hidden = false;
    say("Uploading", "");
    request.send(file);
  });
})();

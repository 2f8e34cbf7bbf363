// Calls the JSON API. Either it answers, or it refuses, or the connection is lost: then trying again makes sense.

const formToken = document.querySelector('meta[name="form-token"]').content;
const TIMEOUT_MS = 15000;

export class Lost extends Error {
  constructor(waitMs = 0) {
    super("connection lost");
    this.waitMs = waitMs;
  }
}

export class Refusal extends Error {
  constructor(status, why, message) {
    super(message);
    this.status = status;
    this.why = why;
  }

  // Whether this page has no more business here: the link does not work any more, or its labeler is excluded.
  get isFinal() {
    return this.status === 401 || this.status === 403;
  }
}

export async function call(path, body, options = {}) {
  if (navigator.onLine === false) throw new Lost();
  let response, data;
  try {
    response = await fetch(`api/${path}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Form-Token": formToken },
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(TIMEOUT_MS),
      ...options,
    });
    data = response.status === 204 ? null : await response.json();
  } catch {
    throw new Lost();
  }
  if (response.status === 429 || response.status >= 500) {
    throw new Lost(1000 * (Number(response.headers.get("Retry-After")) || 0));
  }
  if (!response.ok) throw new Refusal(response.status, data.why, data.message);
  return data;
}

export const sleep = (ms, ...events) =>
  new Promise((resolve) => {
    const wake = () => {
      clearTimeout(timer);
      events.forEach((event) => removeEventListener(event, wake));
      resolve();
    };
    const timer = setTimeout(wake, ms);
    events.forEach((event) => addEventListener(event, wake));
  });

// The files of the site: fetched from its own folder, checked against the hashes in site.json.

import { SiteError } from "./errors.js";
import { sha256 } from "./sha256.js";

const HOME = new URL("../", import.meta.url);

/** The address of a file of the site. */
export function address(name) {
  return new URL(name, HOME).href;
}

/** The bytes of a file; `onPart` is told how many have come. */
export async function bytesOf(name, onPart = () => {}) {
  let response;
  try {
    response = await fetch(address(name));
  } catch (error) {
    throw new SiteError(`${name} could not be loaded (${error.message}): is the server still running? Reload the page.`);
  }
  if (!response.ok) {
    throw new SiteError(`${name} could not be loaded (${response.status}): copy the whole folder that lorac-deploy wrote.`);
  }
  const parts = [];
  let length = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    onPart(value.length);
  }
  return joined(parts, length);
}

function joined(parts, length) {
  const whole = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** A JSON file of the site. */
export async function jsonOf(name) {
  const text = new TextDecoder().decode(await bytesOf(name));
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SiteError(`${name} is damaged (${error.message}): copy the site again.`);
  }
}

/** A file of the artifact, checked against size and sha256 in `files` of site.json. */
export async function checked(name, files, onPart) {
  const entry = files[name];
  if (!entry) throw new SiteError(`This site has no ${name}: write it anew with lorac-deploy web.`);
  const bytes = await bytesOf(`artifact/${name}`, onPart);
  if (bytes.length !== entry.nbytes) {
    throw new SiteError(`${name} has ${bytes.length} bytes, expected ${entry.nbytes}: copy the site again.`);
  }
  if ((await sha256(bytes)) !== entry.sha256) {
    throw new SiteError(`${name} was altered: its sha256 is not the one in site.json. Copy the site again.`);
  }
  return bytes;
}

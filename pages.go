package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"embed"
	"fmt"
	"html"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
)

//go:embed static
var static embed.FS

// pagePolicy lets pages load our own files, and the avatars that WeChat keeps at
// qlogo.cn. Only the demo frames a page: its phone, beside the login page.
func (c *config) pagePolicy() string {
	framed := "frame-ancestors 'none'"
	if c.demo {
		framed = "frame-src 'self'; frame-ancestors 'self'"
	}
	pictures := "'self' https://*.qlogo.cn"
	if c.account != "" {
		pictures += " " + originOf(c.openBase).String() // its own QR code
	}
	return "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
		"img-src " + pictures + "; form-action 'self'; base-uri 'none'; " + framed
}

// site returns the name that people know this site by.
func (c *config) site() string { return cmp.Or(c.siteName, originOf(c.publicURL).Host) }

// loginPage serves the login page, which knows who is logged in already, and leads
// back to return_to if that is safe.
func (s *server) loginPage(w http.ResponseWriter, r *http.Request) error {
	who := new(session)
	if claims, err := s.signer.fromRequest(r); err == nil {
		who = claims
	}
	return s.config.writePage(w, http.StatusOK, "static/index.html", "Site", s.config.site(),
		"Flows", strings.Join(s.config.flows, ","), "ReturnTo", returnTo(r.URL.RawQuery),
		"OpenID", who.OpenID, "Nickname", who.Nickname, "Avatar", who.Avatar)
}

// phoneSucceeded shows the phone that somebody is logged in. Where the login began inside
// WeChat, the page's script goes back to it from there. No redirect to another site can
// take its place: browsers hold the confirmation's form to pagePolicy's form-action.
func phoneSucceeded(w http.ResponseWriter, r *http.Request) error {
	http.Redirect(w, r, "/static/html/loginsucceed.html", http.StatusSeeOther)
	return nil
}

// phoneFailed shows the phone why there is no login.
func phoneFailed(w http.ResponseWriter, r *http.Request, why outcome) error {
	http.Redirect(w, r, "/static/html/loginfailed.html?reason="+string(why), http.StatusSeeOther)
	return nil
}

// markup is HTML for a page; other text is escaped.
type markup string

// writePage fills in a page. pairs are the names in its {{}}, each with a text or
// markup. html/template would make the binary larger by a tenth.
func (c *config) writePage(w http.ResponseWriter, status int, name string, pairs ...any) error {
	page, err := static.ReadFile(name)
	if err != nil {
		return err
	}
	var filled []string
	for pair := range slices.Chunk(pairs, 2) {
		value, ok := pair[1].(markup)
		if !ok {
			value = markup(html.EscapeString(pair[1].(string)))
		}
		filled = append(filled, "{{"+pair[0].(string)+"}}", string(value))
	}
	w.Header().Set("Content-Security-Policy", c.pagePolicy())
	return write(w, status, "text/html; charset=utf-8", []byte(strings.NewReplacer(filled...).Replace(string(page))))
}

// ownership shows WeChat the file by which an account proves that it owns our
// domain; its content is a part of its name.
func (s *server) ownership(w http.ResponseWriter, r *http.Request) error {
	code := strings.TrimSuffix(strings.TrimPrefix(s.config.verifyFile, "MP_verify_"), ".txt")
	return write(w, http.StatusOK, plainText, []byte(code))
}

// page serves a file as it is: neither a directory, nor a page with {{}} to fill in.
func (s *server) page(w http.ResponseWriter, r *http.Request) error {
	name := strings.TrimPrefix(r.URL.Path, "/")
	data, err := static.ReadFile(name)
	if err != nil || bytes.Contains(data, []byte("{{")) {
		return errNothingHere
	}
	sum := sha256.Sum256(data)
	w.Header().Set("ETag", fmt.Sprintf(`"%x"`, sum[:8]))
	w.Header().Set("Cache-Control", "no-cache")
	w.Header().Set("Content-Security-Policy", s.config.pagePolicy())
	http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(data))
	return nil
}

// ownPath matches what a browser takes for a path of the site that it is on. A
// second slash at the start would begin a host; browsers read backslashes as
// slashes, and skip tabs and newlines.
var ownPath = regexp.MustCompile(`^/([^/\\\p{Cc}][^\\\p{Cc}]*)?$`)

// returnTo returns the path to go to after a login, with its query and fragment, from
// a raw query; "" if there is none, or it is no path of this site. A path that is not
// escaped goes on to the end of the query, so that a proxy can append its request URI.
func returnTo(rawQuery string) string {
	_, path, _ := strings.Cut("&"+rawQuery, "&return_to=")
	if !strings.HasPrefix(path, "/") {
		path, _, _ = strings.Cut(path, "&")
		path, _ = url.QueryUnescape(path)
	}
	if _, err := url.Parse(path); err != nil || !ownPath.MatchString(path) {
		return ""
	}
	return path
}

// draw shows the QR code of a live ticket, as a picture or as text. Drawing costs
// milliseconds: the browser keeps what it got, and nobody gets it too often.
func (s *server) draw(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	ticket, err := s.tickets.look(r.Context(), digest(query.Get("ticket")))
	if err != nil {
		return err
	}
	if ticket.Status == statusExpired || ticket.Flow == flowCode {
		return errNothingHere
	}
	if err := s.pass(&s.pictureLimit, w, r); err != nil {
		return err
	}
	text := ticket.Shown
	if ticket.Flow == flowAuth {
		text = s.wechat.loginURL(s.config.publicURL, digest(query.Get("ticket")))
	}
	var contentType string
	var picture []byte
	switch path.Ext(r.URL.Path) {
	case ".txt":
		contentType = plainText
		picture, err = qrText(text, query.Get("invert") == "1")
	case ".svg":
		contentType = "image/svg+xml"
		picture, err = qrSVG(text)
	default:
		contentType = "image/png"
		picture, err = qrPNG(text)
	}
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", fmt.Sprintf("private, max-age=%d", int(ticket.left().Seconds())))
	return write(w, http.StatusOK, contentType, picture)
}

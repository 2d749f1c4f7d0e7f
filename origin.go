package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
)

var errCrossOrigin = errors.New("from another site")

// guard sets the security headers of every answer, keeps other sites from what
// changes state, and lets the front ends of ALLOWED_ORIGINS use what a login takes.
func (s *server) guard(mux *http.ServeMux) http.Handler {
	protection := http.NewCrossOriginProtection()
	protection.AddInsecureBypassPattern("POST /wechat/message") // signed, and WeChat is no browser
	protection.AddInsecureBypassPattern("POST /api/wechat")
	if own, err := parseOrigin(s.config.publicURL); err == nil {
		protection.AddTrustedOrigin(own) // a proxy may have changed the Host
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("Referrer-Policy", "same-origin") // no-referrer would make the Origin of our own forms null
		header.Set("Cache-Control", "no-store")
		if s.config.tlsCert != "" { // else it is for the proxy to say
			header.Set("Strict-Transport-Security", "max-age=31536000")
		}
		if len(s.config.allowedOrigins) > 0 && s.allow(w, r) {
			return
		}
		if err := protection.Check(r); err != nil {
			_, r.Pattern = mux.Handler(r)
			s.fail(w, r, fmt.Errorf("%w: %w", errCrossOrigin, err))
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// allow tells browsers which origins may read an answer. It is true if a
// browser's question about that (a preflight) is thereby answered.
func (s *server) allow(w http.ResponseWriter, r *http.Request) bool {
	switch r.URL.Path {
	case "/wechat/getloginqr", "/wechat/getauthqr", "/wechat/getlogincode", "/wechat/checklogin", "/wechat/session":
	default:
		return false
	}
	w.Header().Set("Vary", "Origin")
	origin := r.Header.Get("Origin")
	if !slices.Contains(s.config.allowedOrigins, origin) {
		return false
	}
	w.Header().Set("Access-Control-Allow-Origin", origin)
	w.Header().Set("Access-Control-Allow-Credentials", "true")
	if r.Method != http.MethodOptions {
		return false
	}
	w.Header().Set("Access-Control-Allow-Headers", "Authorization")
	w.Header().Set("Access-Control-Max-Age", "600")
	w.WriteHeader(http.StatusNoContent)
	return true
}

// notElsewhere lets no page of another site through to h, unless its origin is
// allowed: a picture there would spend our tickets, and WeChat's daily quota.
func (s *server) notElsewhere(h handler) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		switch r.Header.Get("Sec-Fetch-Site") {
		case "cross-site", "same-site":
			if !slices.Contains(s.config.allowedOrigins, r.Header.Get("Origin")) {
				return errCrossOrigin
			}
		}
		return h(w, r)
	}
}

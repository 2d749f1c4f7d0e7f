package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"time"
)

// newLog returns a log of the format text or json. Messages and errors may quote
// strangers, so they are cut at 300 characters.
func newLog(w io.Writer, level slog.Level, format string) *slog.Logger {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == "err" || a.Key == slog.MessageKey {
			a.Value = slog.StringValue(fmt.Sprintf("%.300s", a.Value))
		}
		return a
	}}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// errorLog returns the log for net/http's server. Strangers cause most of its lines,
// by bad TLS handshakes for example: it passes on 60 a minute.
func errorLog(log *slog.Logger) *stdlog.Logger {
	return slog.NewLogLogger(limited{log.Handler(), &limiter{rate: 60, window: time.Minute}}, slog.LevelWarn)
}

type limited struct {
	slog.Handler
	logLimit *limiter
}

func (h limited) Handle(ctx context.Context, r slog.Record) error {
	if !h.logLimit.allows("") {
		return nil
	}
	return h.Handler.Handle(ctx, r)
}

// A lineWriter holds log lines until another goroutine writes them: no login waits
// for a terminal that is being scrolled, or a pipe that nobody reads.
type lineWriter chan []byte

// newLineWriter also returns what ends it: that writes the lines held, for a second
// at most.
func newLineWriter(w io.Writer) (lines lineWriter, end func()) {
	lines, written := make(lineWriter, 1000), make(chan struct{})
	go func() { // until end
		for line := range lines {
			if line == nil {
				break
			}
			w.Write(line)
		}
		close(written)
	}()
	return lines, func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		select {
		case lines <- nil: // in place of close, as a handler that was cut off may still log
		case <-ctx.Done():
		}
		select {
		case <-written:
		case <-ctx.Done():
		}
	}
}

// Write drops the line when too many are held.
func (l lineWriter) Write(line []byte) (int, error) {
	select {
	case l <- bytes.Clone(line):
	default:
	}
	return len(line), nil
}
